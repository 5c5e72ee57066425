// A libcuda.so that launches nothing and answers as for an H100: the functions that Triton's launcher calls. See host.py.
#include <cuda.h>
static int dummy;
CUresult cuInit(unsigned f){return 0;}
CUresult cuDeviceGetCount(int*c){*c=1;return 0;}
CUresult cuGetErrorString(CUresult e,const char**s){*s="stub";return 0;}
CUresult cuCtxGetCurrent(CUcontext*c){*c=(CUcontext)&dummy;return 0;}
CUresult cuCtxSetCurrent(CUcontext c){return 0;}
CUresult cuCtxGetDevice(CUdevice*d){*d=0;return 0;}
CUresult cuDeviceGet(CUdevice*d,int i){*d=i;return 0;}
CUresult cuDevicePrimaryCtxRetain(CUcontext*c,CUdevice d){*c=(CUcontext)&dummy;return 0;}
CUresult cuDeviceGetAttribute(int*v,CUdevice_attribute a,CUdevice d){
 switch((int)a){
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:*v=9;break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:*v=0;break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:*v=232448;break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:*v=233472;break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:*v=132;break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:*v=32;break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:*v=65536;break;
  default:*v=1024;}
 return 0;}
CUresult cuStreamIsCapturing(CUstream s,CUstreamCaptureStatus*st){*st=0;return 0;}
CUresult cuModuleLoadData(CUmodule*m,const void*d){*m=(CUmodule)&dummy;return 0;}
CUresult cuModuleGetFunction(CUfunction*f,CUmodule m,const char*n){*f=(CUfunction)&dummy;return 0;}
CUresult cuModuleUnload(CUmodule m){return 0;}
CUresult cuFuncGetAttribute(int*v,CUfunction_attribute a,CUfunction f){*v= (a==CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?1024:0;return 0;}
CUresult cuFuncSetAttribute(CUfunction f,CUfunction_attribute a,int v){return 0;}
CUresult cuFuncSetCacheConfig(CUfunction f,CUfunc_cache c){return 0;}
CUresult cuCtxGetLimit(size_t*p,CUlimit l){*p=0;return 0;}
CUresult cuCtxSetLimit(CUlimit l,size_t v){return 0;}
CUresult cuDriverGetVersion(int*v){*v=12080;return 0;}
CUresult cuPointerGetAttribute(void*data,CUpointer_attribute a,CUdeviceptr p){*(CUdeviceptr*)data=p;return 0;}
CUresult cuLaunchKernelEx(const CUlaunchConfig*c,CUfunction f,void**p,void**e){return 0;}
CUresult cuOccupancyMaxActiveClusters(int*n,CUfunction f,const CUlaunchConfig*c){*n=8;return 0;}
