// Operators of torch for CPU tensors that allocate their result and compute nothing. See host.py.
#include <torch/library.h>
#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
using at::Tensor; using at::Scalar;
static Tensor like(const Tensor& a){return at::empty_like(a);} 
Tensor& fill_(Tensor& s,const Scalar&){return s;}
Tensor& zero_(Tensor& s){return s;}
Tensor& copy_(Tensor& s,const Tensor&,bool){return s;}
Tensor mm(const Tensor&a,const Tensor&b){return at::empty({a.size(0),b.size(1)},a.options());}
Tensor& mm_out(const Tensor&a,const Tensor&b,Tensor&o){return o;}
Tensor addmm(const Tensor&c,const Tensor&a,const Tensor&b,const Scalar&,const Scalar&){return at::empty({a.size(0),b.size(1)},a.options());}
Tensor& addmm_out(const Tensor&c,const Tensor&a,const Tensor&b,const Scalar&,const Scalar&,Tensor&o){return o;}
Tensor& addmm_(Tensor&c,const Tensor&a,const Tensor&b,const Scalar&,const Scalar&){return c;}
Tensor bmm(const Tensor&a,const Tensor&b){return at::empty({a.size(0),a.size(1),b.size(2)},a.options());}
Tensor add(const Tensor&a,const Tensor&b,const Scalar&){return at::empty(at::infer_size(a.sizes(),b.sizes()),a.options().dtype(at::result_type(a,b)));}
Tensor mul(const Tensor&a,const Tensor&b){return at::empty(at::infer_size(a.sizes(),b.sizes()),a.options().dtype(at::result_type(a,b)));}
Tensor& add_(Tensor&a,const Tensor&b,const Scalar&){return a;}
Tensor& mul_(Tensor&a,const Tensor&b){return a;}
Tensor band(const Tensor&a,const Tensor&b){return at::empty(at::infer_size(a.sizes(),b.sizes()),a.options());}
Tensor& band_out(const Tensor&a,const Tensor&b,Tensor&o){return o;}
Tensor& nan_out(const Tensor&a,std::optional<double>,std::optional<double>,std::optional<double>,Tensor&o){return o;}
Tensor bnot(const Tensor&a){return like(a);}
Tensor cmp(const Tensor&a,const Tensor&b){return at::empty(at::infer_size(a.sizes(),b.sizes()),a.options().dtype(at::kBool));}
Tensor where(const Tensor&c,const Tensor&a,const Tensor&b){return at::empty(at::infer_size(c.sizes(),at::infer_size(a.sizes(),b.sizes())),a.dim()?a.options():b.options());}
Tensor sumdim(const Tensor&a,at::OptionalIntArrayRef d,bool k,std::optional<at::ScalarType> t){
  auto s=a.sizes().vec(); auto o=a.options(); if(t) o=o.dtype(*t); else if(a.scalar_type()==at::kBool) o=o.dtype(at::kLong);
  if(d&&d->size()==1&&!k){s.erase(s.begin()+((*d)[0]<0?(*d)[0]+a.dim():(*d)[0]));return at::empty(s,o);} 
  if(d&&d->size()==2&&!k){ std::vector<int64_t> r; for(int64_t i=0;i<a.dim();i++) if(i!=(*d)[0]&&i!=(*d)[1]) r.push_back(s[i]); return at::empty(r,o);} 
  return at::empty({},o);} 
Tensor& sum_out(const Tensor&a,at::OptionalIntArrayRef d,bool k,std::optional<at::ScalarType> t,Tensor&o){return o;}
Tensor cat(const at::ITensorListRef& l,int64_t dim){
  auto m=l.materialize(); auto s=m[0].get().sizes().vec(); if(dim<0)dim+=s.size(); s[dim]=0; for(const Tensor&t:m) s[dim]+=t.size(dim); return at::empty(s,m[0].get().options());}
Tensor masked_fill(const Tensor&a,const Tensor&m,const Scalar&){return at::empty(at::infer_size(a.sizes(),m.sizes()),a.options());}
Tensor& masked_fill_(Tensor&a,const Tensor&,const Scalar&){return a;}
Tensor& bern(Tensor&a,double,std::optional<at::Generator>){return a;}
Tensor gather(const Tensor&a,int64_t,const Tensor&i,bool){return at::empty(i.sizes(),a.options());}
std::tuple<Tensor,Tensor> dropout(const Tensor&a,double,std::optional<bool>){return {like(a),at::empty(a.sizes(),a.options().dtype(at::kBool))};}
Tensor dropout_backward(const Tensor&g,const Tensor&,double){return like(g);}
TORCH_LIBRARY_IMPL(aten, CPU, m){
 m.impl("fill_.Scalar",fill_); m.impl("zero_",zero_); m.impl("copy_",copy_);
 m.impl("mm",mm); m.impl("mm.out",mm_out); m.impl("addmm",addmm); m.impl("addmm.out",addmm_out); m.impl("addmm_",addmm_); m.impl("bmm",bmm);
 m.impl("add.Tensor",add); m.impl("add_.Tensor",add_); m.impl("mul.Tensor",mul); m.impl("mul_.Tensor",mul_); m.impl("bitwise_and.Tensor",band); m.impl("bitwise_and.Tensor_out",band_out);
 m.impl("nan_to_num.out",nan_out); m.impl("bitwise_not",bnot); m.impl("eq.Tensor",cmp); m.impl("lt.Tensor",cmp); m.impl("where.self",where); m.impl("sum.dim_IntList",sumdim); m.impl("sum.IntList_out",sum_out);
 m.impl("native_dropout",dropout); m.impl("native_dropout_backward",dropout_backward); m.impl("cat",cat); m.impl("gather",gather); m.impl("masked_fill.Scalar",masked_fill); m.impl("masked_fill_.Scalar",masked_fill_); m.impl("bernoulli_.float",bern);
}
#include <Python.h>
static PyModuleDef d={PyModuleDef_HEAD_INIT,"noop",0,-1,0};
PyMODINIT_FUNC PyInit_noop(){return PyModule_Create(&d);}
