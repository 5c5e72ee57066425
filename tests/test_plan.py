"""Plans, which are plain arithmetic and need no GPU."""
import dataclasses

import pytest
import torch

from problems import PORTABLE
from triton_lstm import Plan, PlanError, make_plan
from triton_lstm.plan import A100, B200, H200, RTX_3090, RTX_4090, RTX_5090, Limits, check_plan, keep_every_for
from triton_lstm.plan.plan import HELD_BYTES
from triton_lstm.plan.search import BACKWARD_ELEMENTS, KEEP_EVERY

# Limits with clusters, whether the installed Triton can compile them or not.
CLUSTERS = dataclasses.replace(H200, cluster=16, wgmma=False)
SIZES = [1, 5, 16, 17, 33, 64, 96, 100, 128, 130, 192, 256, 400, 512, 640, 768, 1000, 1024, 1150, 1536, 2048]


@pytest.mark.parametrize("limits", [H200, CLUSTERS, PORTABLE, A100, RTX_3090, RTX_4090, B200, RTX_5090], ids=[
    "H200", "clusters", "portable", "A100", "RTX 3090", "RTX 4090", "B200", "RTX 5090"])
@pytest.mark.parametrize("dtype, tf32", [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)],
                         ids=str)
@pytest.mark.parametrize("hidden_size", SIZES)
def test_every_size_has_a_plan_that_fits(hidden_size, dtype, tf32, limits):
    for directions in (1, 2):
        for batch in (0, 1, 16, 17, 300, 4096):
            plan = make_plan(batch, hidden_size, dtype, directions, limits=limits, tf32=tf32)
            check_plan(plan, limits)
            if plan.schedule == "cluster":
                assert plan.register_bytes <= HELD_BYTES and plan.shared_bytes <= limits.shared_memory
                assert 2 <= plan.programs <= limits.cluster
                continue
            if plan.gluon:
                assert plan.register_bytes <= HELD_BYTES and plan.shared_bytes <= limits.shared_memory
            else:
                assert plan.held_bytes <= HELD_BYTES
            assert plan.programs * plan.block_h >= hidden_size
            assert plan.groups * plan.tiles * plan.block_b >= batch
            if plan.schedule != "resident":
                assert plan.launched <= limits.multiprocessors
            assert (plan.held >= hidden_size) == (plan.schedule != "streamed") == (plan.streamed_bytes == 0)


def test_chosen_schedules():
    schedule = lambda H, dtype=torch.bfloat16, **kw: make_plan(16, H, dtype, limits=PORTABLE, **kw).schedule
    assert [schedule(H) for H in (1, 64, 128, 129, 512, 1024, 1056, 2048)] == [
        "resident"] * 3 + ["grid"] * 3 + ["streamed"] * 2
    assert [schedule(H, torch.float32) for H in (64, 65, 512, 544)] == ["resident", "grid", "grid", "streamed"]
    assert [schedule(H, torch.float32, tf32=False) for H in (64, 65, 256, 257)] == [
        "resident", "grid", "grid", "streamed"]


def test_chosen_clusters():
    """For few rows, the cluster size with the fastest step is chosen; for many rows, that with the fewest waves."""
    programs = lambda H, dtype=torch.bfloat16, batch=16, limits=CLUSTERS, **kw: make_plan(
        batch, H, dtype, limits=limits, **kw).programs
    schedule = lambda *args, **kw: make_plan(16, *args, limits=CLUSTERS, **kw).schedule
    assert [schedule(H, torch.bfloat16) for H in (128, 129, 512, 640)] == ["resident", "cluster", "cluster", "grid"]
    assert [schedule(H, torch.float32) for H in (64, 65, 512, 544, 1152, 1153)] == [
        "resident", "cluster", "cluster", "grid", "grid", "streamed"]
    assert schedule(256, torch.float32, tf32=False) == "grid"
    assert [programs(H) for H in (129, 256, 300, 512)] == [8, 8, 16, 16]
    assert [programs(512, batch=batch) for batch in (128, 256, 1024)] == [16, 8, 8]
    assert [programs(H, torch.float32) for H in (100, 256, 512)] == [4, 8, 16]
    assert programs(512, limits=dataclasses.replace(CLUSTERS, cluster=8), schedule="cluster") == 8
    assert make_plan(16, 512, torch.bfloat16, limits=dataclasses.replace(CLUSTERS, cluster=1)).schedule == "grid"


def test_wide_or_streamed():
    """A wide split plan is chosen for few rows. For many rows backward's streamed tiles of 32 rows are cheaper, and in
    forward wgmma plans where R fits the shared memory of their programs."""
    def kinds(batch, H, dtype=torch.bfloat16, directions=1):
        plan = make_plan(batch, H, dtype, directions, limits=H200)
        return plan.variant, plan.backward.variant

    assert {kinds(batch, H) for batch in (1, 17, 32, 48) for H in (1088, 1150)} == {("wide split",) * 2}
    assert kinds(100, 1150) == ("wgmma", "wide split") and kinds(100, 2048) == ("wide split",) * 2
    assert kinds(512, 1088) == kinds(512, 1150) == ("wgmma", "streamed")
    assert kinds(512, 2048) == ("wide split", "streamed")
    assert kinds(80, 1150, torch.float32) == kinds(512, 1150, torch.float32) == ("wide split",) * 2
    assert kinds(16, 2112) == ("wide split",) * 2 and kinds(16, 2128)[1] == "streamed"
    # two directions take twice as many programs
    assert kinds(16, 1056, directions=2) == ("wide split",) * 2 and kinds(16, 1072, directions=2)[1] == "streamed"


def test_cluster_bytes():
    """R of 4 gates x 512 units x 512 units is shared by 8 programs. Half of it is in registers."""
    plan = make_plan(16, 512, torch.bfloat16, limits=dataclasses.replace(CLUSTERS, cluster=8), schedule="cluster")
    assert plan.r_bytes == plan.programs * plan.held_bytes == plan.programs * 2 * plan.register_bytes
    # In shared memory: the other half; da of 16 rows x 4 x 64 units; two buffers of fp32 shares from 8 programs of 64
    # units; two mbarriers.
    assert plan.shared_bytes == 131072 + 16 * 4 * 64 * 2 + 2 * 16 * 8 * 64 * 4 + 16
    one = make_plan(16, 100, torch.float16, limits=CLUSTERS)
    assert one.gluon and one.held_bytes == one.register_bytes == 4 * 128 * 128 * 2     # padded
    assert one.streamed_bytes == 0 and one.backward_bytes(64, 8, 2) < make_plan(
        16, 100, torch.float16, limits=PORTABLE, schedule="grid").backward_bytes(64, 8, 2)


def test_bytes():
    """R of 4 gates x 512 units x 512 units in bf16 is shared by 32 programs of 16 units. All of it is on chip."""
    plan = make_plan(16, 512, torch.bfloat16, limits=PORTABLE)
    assert (plan.programs, plan.groups, plan.tiles, plan.block_h) == (32, 1, 1, 16)
    assert plan.r_bytes == 4 * 512 * 512 * 2 == plan.programs * plan.held_bytes
    assert plan.streamed_bytes == 0
    # in tf32x3 R is two fp32 matrices
    assert make_plan(16, 256, torch.float32, tf32=False).held_bytes == 2 * make_plan(
        16, 256, torch.float32, limits=PORTABLE).held_bytes == 2 * 4 * 16 * 256 * 4
    streamed = make_plan(16, 2048, torch.bfloat16, limits=PORTABLE)
    assert streamed.held_bytes + streamed.streamed_bytes == 4 * 16 * 2048 * 2


def test_chunks_do_not_pad_to_a_power_of_two():
    assert [width for _, width in make_plan(16, 640, torch.bfloat16, limits=PORTABLE).r_slices] == [256, 256, 128]
    assert make_plan(16, 96, torch.bfloat16, limits=PORTABLE).r_slices == ((0, 64), (64, 32))
    assert make_plan(1, 5, torch.bfloat16).r_slices == ((0, 16),)


def test_prints():
    text = str(make_plan(64, 512, torch.bfloat16, 2, limits=CLUSTERS))
    assert text.startswith("cluster: H=512 B=64 x 2 direction(s), native; 128 KiB of R in the registers of each")
    assert "clusters of 16 programs share R and exchange h through shared memory; 128 programs of 8 warps" in text
    assert "256 KiB of R in the registers and shared memory of each" in str(make_plan(1, 512, torch.float32,
                                                                                       limits=CLUSTERS))
    text = str(make_plan(64, 512, torch.bfloat16, 2, limits=PORTABLE))
    assert text.startswith("grid: H=512 B=64 x 2 direction(s), native; 128 KiB of R in the registers of each program")
    assert "16 programs share R and exchange h through L2" in text


def test_encoding_round_trip():
    plan = make_plan(64, 640, torch.float32, 2, keep_every=32)
    assert Plan.decode(plan.encode()) == plan
    cluster = make_plan(64, 256, torch.float32, limits=CLUSTERS)
    assert cluster.gluon and Plan.decode(cluster.encode()) == cluster
    assert hash(Plan.decode(plan.encode())) == hash(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.tiles = 2


def test_keep_every_bounds_the_workspace():
    for batch in (1, 16, 1024, 4096):
        for hidden_size in (32, 512, 2048):
            steps = keep_every_for(batch, hidden_size, 1)
            assert 16 <= steps <= KEEP_EVERY and (steps == 16 or steps * batch * hidden_size <= BACKWARD_ELEMENTS)
    assert make_plan(16, 64, torch.float32, keep_every=7).keep_every == 7


@pytest.mark.parametrize("change, reason", [
    (dict(keep_every=0), "keep_every must be at least 1, got 0"),
    (dict(programs=7), "7 programs of 16 units hold fewer than 512"),
    (dict(tiles=1, groups=1, batch=33), "1 groups of 1 tiles hold fewer than 33"),
    (dict(groups=5), "160 programs of 16 units wait for each other but only 132"),
    (dict(r_slices=((0, 48),)), "powers of two"),
    (dict(r_slices=((0, 256),)), "grid with 256 of 512"),
    (dict(r_slices=((0, 256), (0, 256))), "one after the other"),
    (dict(block_h=64), "262144 bytes of R do not fit the registers of a program"),
    (dict(kind="best"), "unknown kind 'best'"),
    (dict(kind="cluster"), "cluster programs and their units must be powers of two"),
    (dict(kind="portable resident"), "a resident plan has one program, got 32"),
    (dict(kind="streamed", r_slices=((0, 256),), block_k=24), "block_k must be a power of two from 16 up, got 24"),
])
def test_impossible_plans_say_why(change, reason):
    plan = dataclasses.replace(make_plan(16, 512, torch.bfloat16, limits=PORTABLE), **change)
    with pytest.raises(PlanError, match=reason.replace("(", r"\(")):
        check_plan(plan, PORTABLE)


@pytest.mark.parametrize("change, cluster, reason", [
    (dict(), 8, "a cluster of 16 programs, where at most 8 run"),
    (dict(), 0, "the cluster kernels need compute capability 8.0, 8.6, .* or 12.1 and Triton 3.6"),
    (dict(programs=32), 16, "a cluster has 2 to 16 programs, got 32"),
    (dict(programs=11, block_h=64), 16, "must be powers of two"),
    (dict(block_h=16, programs=32), 16, "from 16 and four a warp up, got 32 of 16 units and 8 warps"),
    (dict(programs=8), 16, "8 programs of 32 units hold fewer than 512"),
    (dict(precision="tf32x3"), 16, "no exact fp32"),
    (dict(precision="tf32", programs=8, block_h=64), 16, "475152 bytes of R and a step's tiles do not fit"),
])
def test_impossible_clusters_say_why(change, cluster, reason):
    plan = dataclasses.replace(make_plan(16, 512, torch.bfloat16, limits=CLUSTERS), **change)
    with pytest.raises(PlanError, match=reason):
        check_plan(plan, dataclasses.replace(CLUSTERS, cluster=cluster))


@pytest.mark.parametrize("call, reason", [
    (lambda: make_plan(16, 512, torch.float64), "no kernel computes in torch.float64"),
    (lambda: make_plan(16, 0, torch.float32), "hidden_size 0"),
    (lambda: make_plan(-1, 8, torch.float32), "batch -1"),
    (lambda: make_plan(1, 8, torch.float32, 3), "3 directions"),
    (lambda: make_plan(1, 8, torch.float32, schedule="best"), "got 'best'"),
    (lambda: make_plan(1, 64, torch.float32, tf32=False, schedule="cluster"), "the cluster kernels have no exact"),
    (lambda: make_plan(1, 64, torch.bfloat16, limits=PORTABLE, schedule="cluster"), "cluster kernels need"),
    (lambda: make_plan(1, 64, torch.bfloat16, limits=None, schedule="cluster"), "interpreter has no cluster kernels"),
    (lambda: make_plan(1, 256, torch.float32, schedule="resident"), "1048576 bytes of R do not fit"),
    (lambda: make_plan(1, 512, torch.bfloat16, limits=Limits(7, 232448)), "8 programs of 64 units wait for each"),
    (lambda: make_plan(1, 64, torch.float32, limits=Limits(1, 49152), schedule="resident"),
     "65536 bytes of R pass through shared memory once, which has 49152"),
])
def test_no_plan_says_why(call, reason):
    with pytest.raises(PlanError, match=reason):
        call()


def test_few_inputs_are_multiplied_in_the_loop():
    """By the resident and cluster kernels; in TF32 only if programs fill half the chip."""
    multiplies = lambda inputs, *args: make_plan(*args, limits=CLUSTERS).multiplies_input(inputs)
    assert multiplies(16, 16, 128, torch.bfloat16) and not multiplies(17, 16, 128, torch.bfloat16)
    assert not multiplies(0, 16, 128, torch.bfloat16)       # without inputs it gets pre-activations
    assert multiplies(1, 1024, 64, torch.float32) and not multiplies(1, 64, 128, torch.float32)
    assert not make_plan(16, 128, torch.bfloat16, limits=PORTABLE).multiplies_input(1)
