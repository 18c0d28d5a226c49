"""Which GPU and which cores each rank of a host gets: for every number of ranks, of GPUs and of cores."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from launcher import layout
from ssd_runtime.allotment import cores_beside, cores_of, gpus_of, lacks_gpus, model_of, roles_in_order
from ssd_runtime.config import Config, DeploymentConfig, ModelConfig
from ssd_runtime.cores import Role, crowding
from ssd_runtime.hardware import Gpu, Hardware, read
from tests.recorded_nvml import RecordedNvml

H100 = read(RecordedNvml(), {})
DEVICES = st.sampled_from(["cpu", "cuda"])


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any devices, threads and numbers of ranks; GPUs are shared only where both roles are on them."""
    target = ModelConfig(device=draw(DEVICES), threads=draw(st.integers(1, 6)), tensor_parallel=draw(st.integers(1, 4)))
    draft = ModelConfig(device=draw(DEVICES), threads=draw(st.integers(1, 6)))
    share = target.device == draft.device == "cuda" and draw(st.booleans())
    return Config(target, draft, deployment=DeploymentConfig(drafts=draw(st.integers(1, 4)), share_gpu=share))


@st.composite
def hosts(draw: st.DrawFn) -> tuple[Config, list[Role]]:
    """A world's configuration and the ranks of one of its nodes."""
    config = draw(configs())
    targets, drafts = config.target.tensor_parallel, draw(st.integers(0, config.deployment.drafts))
    counts = layout.spread(targets, drafts, draw(st.integers(1, targets + drafts)))
    node = draw(st.integers(0, len(counts) - 1))
    return config, [seat.role for seat in layout.seats(targets, counts) if seat.node == node]


@given(hosts())
def test_gpus_are_taken_without_gaps_and_by_one_rank_each_unless_they_are_shared(host: tuple[Config, list[Role]]):
    config, roles = host
    gpus = gpus_of(config, roles)
    assert [gpu is not None for gpu in gpus] == [model_of(config, role).device == "cuda" for role in roles]
    taken = [gpu for gpu in gpus if gpu is not None]
    assert set(taken) == set(range(len(set(taken))))
    of_role = {role: [gpu for gpu, its in zip(gpus, roles, strict=True) if its == role] for role in roles}
    if not config.deployment.share_gpu:
        assert len(taken) == len(set(taken))
    elif "target" in roles:
        assert of_role["target"] == list(range(len(of_role["target"])))
        drafts = [of_role.get("draft", []).count(gpu) for gpu in of_role["target"]]
        assert sum(drafts) == roles.count("draft")
        assert max(drafts) - min(drafts) <= 1


@given(hosts(), st.integers(1, 8))
def test_a_host_with_too_few_gpus_is_refused_with_a_remedy_that_helps(host: tuple[Config, list[Role]], count: int):
    config, roles = host
    lack = lacks_gpus(config, roles, count)
    assert (lack is None) == (len(set(gpus_of(config, roles)) - {None}) <= count)
    if lack is None:
        return
    assert "\n" not in lack
    remedy = lack.partition(": ")[2]
    fewer = [replace(config, target=replace(config.target, tensor_parallel=1)), roles_in_order(1, roles.count("draft"))]
    tried = {
        "lower target.tensor_parallel": (fewer[0], ["target"]),
        "lower deployment.drafts": (config, [role for role in roles if role == "target"] or ["draft"]),
        "set deployment.share_gpu = true": (
            replace(config, deployment=replace(config.deployment, share_gpu=True)),
            roles,
        ),
        'set draft.device = "cpu"': (replace(config, draft=replace(config.draft, device="cpu")), roles),
    }
    named = {said: lacks_gpus(*one, count) for said, one in tried.items() if said in remedy}
    assert named
    assert set(named.values()) == {None}


CORES = st.sets(st.integers(0, 47), min_size=1, max_size=24).map(sorted)


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    """Up to eight GPUs, near to the even cores, the odd ones or none that anybody knows of."""
    near = st.sampled_from([tuple(range(0, 48, 2)), tuple(range(1, 48, 2)), ()])
    return Hardware(tuple(Gpu(i, "GPU", str(i), 1, 1, cores=draw(near)) for i in range(draw(st.integers(0, 8)))))


def apart(cores: list[tuple[int, ...]]) -> bool:
    return all(not set(a) & set(b) for a, b in combinations(cores, 2))


@given(hosts(), CORES, machines())
def test_ranks_have_cores_of_their_own_wherever_there_are_enough(
    host: tuple[Config, list[Role]], allowed: list[int], hardware: Hardware
):
    config, roles = host
    cores = cores_of(config, roles, allowed, hardware)
    assert set().union(*cores) <= set(allowed)
    on_gpus = [model_of(config, role).device == "cuda" for role in roles]
    if len(allowed) >= len(cores):
        assert apart(cores)
    else:
        told = crowding({f"{role} {i}": mine for i, (role, mine) in enumerate(zip(roles, cores, strict=False))})
        assert (told is None) == apart(cores[: len(roles)])
    for on_gpu, role, mine in zip(on_gpus, roles, cores, strict=False):
        assert mine or (on_gpu and all(on_gpus)), "only where nobody is in the way a rank goes anywhere"
        assert on_gpu or len(mine) <= model_of(config, role).threads


@given(configs(), CORES, machines(), st.booleans())
def test_a_draft_of_a_torchrun_of_its_own_keeps_off_the_cores_of_a_target_here(
    config: Config, allowed: list[int], hardware: Hardware, in_world: bool
):
    """Also where the target came first, in a world that has a draft already or in one that has none."""
    roles = roles_in_order(config.target.tensor_parallel, int(in_world and config.deployment.drafts > 1))
    cores = cores_of(config, roles, allowed, hardware)
    beside = cores_beside(config, config.target.tensor_parallel, allowed, hardware)
    if "cpu" not in (config.target.device, config.draft.device) and not config.deployment.share_gpu:
        return  # near GPUs that one of the two does not see
    if len(allowed) >= config.target.threads * config.target.tensor_parallel + config.deployment.drafts:
        assert apart([*cores[: config.target.tensor_parallel], beside])
    assert beside or config.draft.device == "cuda"
