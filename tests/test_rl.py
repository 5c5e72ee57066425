"""``triton_lstm.rl`` beside the libraries themselves: the same weights and the same rollout give the same losses,
gradients and states, on the kernels and where torch computes."""
import contextlib
import copy
import importlib
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import documents
import harness
import triton_lstm
from triton_lstm.rl import run_episodes

PACKAGES = ("sb3-contrib stable-baselines3 gymnasium torchrl==0.14.1 tensordict==0.14.3 cloudpickle pyvers, "
            "and with --ignore-requires-python cleanrl==1.2.0")
PAGE = Path(triton_lstm.rl.__file__).with_name("README.md")

# Both sum the same products in fp32 in another order, and backward over a rollout sums over its steps.
CLOSE = dict(rtol=1e-4, atol=1e-6)

on_both = pytest.mark.parametrize("where", ["kernels", "torch"])


def computing(where):
    return harness.interpreter() if where == "kernels" else contextlib.nullcontext()


def installed(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps {PACKAGES}")


@contextlib.contextmanager
def quiet_imports():
    """The libraries warn while they are imported, of other packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# One rollout of three environments: an episode that begins with the first step, one in the middle, one with the last
# step, and several in a row.
STARTS = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 1], [0, 1, 1, 1, 0, 0, 1, 0]]).float()   # (B, T)


def loop(lstm, x, state, starts):
    """The loop that ``run_episodes`` replaces. x (T, B, I), starts (T, B)."""
    outputs = []
    for x_t, begins in zip(x, starts):
        y, state = lstm(x_t[None], tuple((1 - begins).view(1, -1, 1) * s for s in state))
        outputs.append(y)
    return torch.cat(outputs), state


def pair(*args, **kwargs):
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(*args, **kwargs)
    ours = copy.deepcopy(theirs)
    triton_lstm.convert(ours)
    return theirs, ours


def assert_same_gradients(ours, theirs):
    want = dict(theirs.named_parameters())
    got = dict(ours.named_parameters())
    assert got.keys() == want.keys() and any(p.grad is not None for p in want.values())
    for name, p in want.items():
        assert (p.grad is None) == (got[name].grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(got[name].grad, p.grad, msg=lambda m: f"{name}: {m}", **CLOSE)     # noqa: B023


# run_episodes

@on_both
@pytest.mark.parametrize("layout", ["time first", "batch first", "flat", "flat, batch first"])
def test_run_episodes_is_the_loop(where, layout):
    theirs, ours = pair(3, 5, 2)
    ours.batch_first = "batch first" in layout
    x, starts = torch.randn(8, 3, 3), STARTS.t()
    first = [torch.randn(2, 3, 5, requires_grad=True) for _ in range(2)]
    same = [s.detach().clone().requires_grad_() for s in first]
    y, state = loop(theirs, x, first, starts)
    (y.square().sum() + state[1].sum()).backward()
    turn = (lambda t: t.transpose(0, 1)) if ours.batch_first else lambda t: t
    given, flags = turn(x), turn(starts)
    if "flat" in layout:
        given, flags = given.flatten(0, 1), flags.flatten()
    with computing(where):
        got, got_state = run_episodes(ours, given, same, flags)
        (got.square().sum() + got_state[1].sum()).backward()
    torch.testing.assert_close(got, turn(y).flatten(0, 1) if "flat" in layout else turn(y), **CLOSE)
    for a, b in zip(got_state, state):
        torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(same, first):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)
    assert_same_gradients(ours, theirs)


@on_both
def test_run_episodes_of_one_step_without_a_state_and_after_nan(where):
    theirs, ours = pair(3, 5)
    x, starts = torch.randn(1, 3, 3), torch.tensor([[True, False, True]])
    state = [torch.randn(1, 3, 5) for _ in range(2)]
    want, _ = loop(theirs, x, state, starts.float())
    for s in state:
        s[:, 0] = float("nan")
    with computing(where), torch.no_grad():
        torch.testing.assert_close(run_episodes(ours, x, state, starts)[0], want.detach(), **CLOSE)
        torch.testing.assert_close(run_episodes(ours, x, None, starts)[0], theirs(x)[0], **CLOSE)
        longer = run_episodes(ours, torch.randn(4, 3, 3), state, starts.expand(4, 3))[0]
        assert longer.isfinite().all()


def test_acting_is_one_launch(monkeypatch):
    _, ours = pair(3, 5)
    calls, real = [], harness.interpreted_launch.launch_kernel
    monkeypatch.setattr(harness.interpreted_launch, "launch_kernel",
                        lambda kernel, *a, **kw: (calls.append(kernel), real(kernel, *a, **kw)))
    state = [torch.randn(1, 3, 5) for _ in range(2)]
    with harness.interpreter(), torch.no_grad():
        run_episodes(ours, torch.randn(3, 3), state, torch.ones(3))
    assert len(calls) == 1


def test_wrong_arguments():
    theirs, ours = pair(3, 5)
    x, state = torch.randn(8, 3, 3), [torch.zeros(1, 3, 5)] * 2
    with pytest.raises(TypeError, match=r"must be a triton_lstm.LSTM, got LSTM: call triton_lstm.convert first"):
        run_episodes(theirs, x, state, STARTS.t())
    with pytest.raises(ValueError, match="bidirectional"):
        run_episodes(triton_lstm.LSTM(3, 5, bidirectional=True), x, None, STARTS.t())
    with pytest.raises(ValueError, match=r"flat x \(24, 3\) needs a state"):
        run_episodes(ours, x.flatten(0, 1), None, STARTS.t())
    with pytest.raises(ValueError, match="x has 23 rows, which is no multiple of the 3 rows"):
        run_episodes(ours, x.flatten(0, 1)[1:], state, STARTS.t())
    with pytest.raises(ValueError, match=r"starts must have one element for each of 8 x 3 steps, got the shape \(7, 3"):
        run_episodes(ours, x, state, STARTS.t()[1:])
    with pytest.raises(ValueError, match=r"two or three dimensions, got the shape \(3,\)"):
        run_episodes(ours, x[0, 0], state, STARTS.t())


@pytest.mark.parametrize("module, package", [("sb3", "sb3_contrib"), ("torchrl", "torchrl")])
def test_a_missing_library_is_named(module, package):
    name = f"triton_lstm.rl.{module}"
    loaded = [other for other in sys.modules if other.startswith(f"{package}.")]    # by another test
    with mock.patch.dict(sys.modules, dict.fromkeys([package, *loaded])):
        sys.modules.pop(name, None)
        wanted = f"{package}[a-z.]* cannot be imported: pip install {package.replace('_', '-')}"
        with pytest.raises(ImportError, match=wanted):
            importlib.import_module(name)


def test_import_needs_no_library():
    program = "import sys, triton_lstm.rl; print([m for m in ('sb3_contrib', 'torchrl', 'gymnasium', 'tensordict') " \
        "if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


# sb3-contrib

@pytest.fixture(scope="module")
def recurrent_ppo():
    """A function that makes a RecurrentPPO with a policy. Its three environments have episodes of other lengths, also
    of one step."""
    installed("sb3_contrib", "stable_baselines3", "gymnasium", "cloudpickle")
    with quiet_imports():
        import gymnasium
        import sb3_contrib
        from stable_baselines3.common.vec_env import DummyVecEnv

    class Episodes(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)

        def __init__(self, lengths):
            self.lengths, self.random = list(lengths), np.random.default_rng(len(lengths))

        def observation(self):
            return self.random.uniform(-1, 1, 3).astype(np.float32)

        def reset(self, seed=None, options=None):
            self.left = self.lengths.pop(0) if self.lengths else 100
            return self.observation(), {}

        def step(self, action):
            self.left -= 1
            return self.observation(), float(action), self.left == 0, False, {}

    def make(policy, **policy_kwargs):
        torch.manual_seed(0)
        envs = DummyVecEnv([lambda lengths=lengths: Episodes(lengths) for lengths in ((100,), (3, 4), (1, 1, 1, 3))])
        return sb3_contrib.RecurrentPPO(
            policy, envs, n_steps=8, batch_size=24, n_epochs=2, ent_coef=0.01, device="cpu", seed=0,
            policy_kwargs=dict(net_arch=[4], lstm_hidden_size=5) | policy_kwargs)
    return make


POLICIES = [dict(), dict(n_lstm_layers=2), dict(shared_lstm=True, enable_critic_lstm=False),
            dict(enable_critic_lstm=False)]


@on_both
@pytest.mark.parametrize("policy_kwargs", POLICIES, ids=str)
def test_recurrent_ppo(recurrent_ppo, where, policy_kwargs):
    """Two updates on a rollout that their policy collected: all logged losses, the last gradients, the parameters."""
    from triton_lstm.rl.sb3 import MlpLstmPolicy
    theirs = recurrent_ppo("MlpLstmPolicy", **policy_kwargs)
    ours = recurrent_ppo(MlpLstmPolicy, **policy_kwargs)
    assert type(ours.policy.lstm_actor) is triton_lstm.LSTM
    for a, b in zip(ours.policy.parameters(), theirs.policy.parameters()):
        assert torch.equal(a, b)                    # the same initialisation from the same seed
    theirs.learn(24)                                # fills the buffer, and trains
    ours.policy.load_state_dict(theirs.policy.state_dict())
    ours.policy.optimizer.load_state_dict(copy.deepcopy(theirs.policy.optimizer.state_dict()))
    buffer = copy.deepcopy(theirs.rollout_buffer)
    starts = buffer.episode_starts
    assert starts[0].all() and starts[1:].sum() >= 5
    from stable_baselines3.common.logger import Logger
    losses = []
    for model in (theirs, ours):
        model.rollout_buffer = copy.deepcopy(buffer)
        model.set_logger(Logger(None, []))
        model._current_progress_remaining = 1.
        np.random.seed(0)
        with computing(where if model is ours else "torch"):
            model.train()
        losses.append({k: v for k, v in model.logger.name_to_value.items() if k.startswith("train/")
                       and k != "train/n_updates"})
    assert losses[0].keys() == losses[1].keys() and {"train/value_loss", "train/loss"} <= losses[0].keys()
    for name, want in losses[0].items():
        assert losses[1][name] == pytest.approx(want, rel=1e-4, abs=1e-6), name
    assert_same_gradients(ours.policy, theirs.policy)
    for a, b in zip(ours.policy.parameters(), theirs.policy.parameters()):
        # Adam divides by the root of squares: rounding of a tiny gradient moves a parameter by a share of lr = 3e-4.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@on_both
def test_recurrent_ppo_resets_inside_rows(recurrent_ppo, where):
    """The policy alone, as an algorithm with another buffer would call it: episodes begin inside rows."""
    from triton_lstm.rl.sb3 import MlpLstmPolicy
    with quiet_imports():
        from sb3_contrib.common.recurrent.type_aliases import RNNStates
    theirs, ours = recurrent_ppo("MlpLstmPolicy").policy, recurrent_ppo(MlpLstmPolicy).policy
    states = RNNStates(*[tuple(torch.randn(1, 3, 5) for _ in range(2)) for _ in range(2)])
    observations, actions = torch.rand(24, 3), torch.randint(2, (24,))
    found = []
    for policy in (theirs, ours):
        with computing(where if policy is ours else "torch"):
            found.append(policy.evaluate_actions(observations, actions, states, STARTS.flatten()))
            sum(t.square().sum() for t in found[-1]).backward()
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, **CLOSE)
    assert_same_gradients(ours, theirs)


def test_recurrent_ppo_is_saved_and_loaded(recurrent_ppo, tmp_path):
    from triton_lstm.rl.sb3 import MlpLstmPolicy
    ours = recurrent_ppo(MlpLstmPolicy)
    ours.save(tmp_path / "model")
    loaded = type(ours).load(tmp_path / "model")
    assert type(loaded.policy) is MlpLstmPolicy and type(loaded.policy.lstm_critic) is triton_lstm.LSTM
    theirs = recurrent_ppo("MlpLstmPolicy")
    theirs.save(tmp_path / "theirs")
    entered = type(ours).load(tmp_path / "theirs", custom_objects=dict(policy_class=MlpLstmPolicy))
    left = type(ours).load(tmp_path / "model", custom_objects=dict(policy_class=type(theirs.policy)))
    assert type(entered.policy) is MlpLstmPolicy and type(left.policy.lstm_actor) is torch.nn.LSTM
    for model, source in ((loaded, ours), (entered, theirs), (left, ours)):
        for a, b in zip(model.policy.parameters(), source.policy.parameters()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name, value", [("batch_first", True), ("bidirectional", True), ("proj_size", 2)])
def test_recurrent_ppo_refuses(recurrent_ppo, name, value):
    from triton_lstm.rl.sb3 import MlpLstmPolicy
    with pytest.raises(ValueError, match=f"cannot have an LSTM with {name}={value}"):
        recurrent_ppo(MlpLstmPolicy, lstm_kwargs={name: value})


# TorchRL

@pytest.fixture(scope="module")
def torchrl():
    installed("torchrl", "tensordict", "pyvers", "cloudpickle")
    with quiet_imports():
        import torchrl.modules
        import torchrl.objectives
        importlib.import_module("triton_lstm.rl.torchrl")
    return torchrl


def modules(torchrl, **kwargs):
    torch.manual_seed(0)
    kwargs = dict(input_size=3, hidden_size=5, in_key="observation", out_key="features") | kwargs
    theirs, ours = torchrl.modules.LSTMModule(**kwargs), triton_lstm.rl.torchrl.LSTMModule(**kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def rollout(layers=1):
    """Three rows of eight steps. Only the first states of rows are not zero; the first episode of row 0 begins with
    one too, as TorchRL lets it."""
    from tensordict import TensorDict
    torch.manual_seed(1)
    states = torch.zeros(2, 3, 8, layers, 5)
    states[:, :, 0] = torch.randn(2, 3, layers, 5)
    return TensorDict({"observation": torch.randn(3, 8, 3), "recurrent_state_h": states[0],
                       "recurrent_state_c": states[1], "is_init": STARTS[..., None].bool()}, [3, 8])


@on_both
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("resets", [True, False])
def test_lstm_module(torchrl, where, layers, resets):
    """Features, the states after the last step, and gradients of weights, observations and first states."""
    found = []
    for module in modules(torchrl, num_layers=layers):
        data = rollout(layers)
        if not resets:
            data["is_init"][:] = False
        leaves = [data[key].requires_grad_() for key in ("observation", "recurrent_state_h", "recurrent_state_c")]
        with computing(where if found else "torch"), torchrl.modules.set_recurrent_mode(True):
            module(data)
            ends = data["next", "recurrent_state_h"][:, -1], data["next", "recurrent_state_c"][:, -1]
            (data["features"].square().sum() + sum(s.sum() for s in ends)).backward()
        # Theirs also has gradients of the zero states stored where an episode begins inside a row.
        gradients = [leaves[0].grad, *(t.grad[:, 0] for t in leaves[1:])]
        found.append((module, [data["features"], *ends, *gradients], data))
    (theirs, want, their_data), (ours, got, our_data) = found
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, **CLOSE)
    assert_same_gradients(ours, theirs)
    assert not our_data["next", "recurrent_state_h"][:, :-1].any()
    assert [our_data[k].shape for k in our_data.keys(True, True)] == [their_data[k].shape
                                                                      for k in our_data.keys(True, True)]


@on_both
def test_lstm_module_acts(torchrl, where):
    """Single steps, outside recurrent mode, where is_init zeroes the state."""
    found = []
    for module in modules(torchrl):
        data = rollout()[:, 0].clone()
        with computing(where if found else "torch"), torch.no_grad():
            module(data)
        found.append(data)
    for key in ("features", ("next", "recurrent_state_h"), ("next", "recurrent_state_c")):
        torch.testing.assert_close(found[1][key], found[0][key], **CLOSE)


@on_both
def test_ppo_loss(torchrl, where):
    """TorchRL's ClipPPOLoss over a rollout, with one LSTM below actor and critic: losses and gradients."""
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torch.distributions import Categorical
    found = []
    for lstm in modules(torchrl):
        torch.manual_seed(2)
        head = TensorDictModule(torch.nn.Linear(5, 2), ["features"], ["logits"])
        actor = torchrl.modules.ProbabilisticActor(TensorDictSequential(lstm, head), in_keys=["logits"],
                                                   distribution_class=Categorical, return_log_prob=True)
        value = torchrl.modules.ValueOperator(torch.nn.Linear(5, 1), in_keys=["features"])
        loss = torchrl.objectives.ClipPPOLoss(actor, TensorDictSequential(lstm, value), entropy_bonus=True)
        data = rollout()
        key = loss.tensor_keys
        data[key.action] = torch.randint(2, (3, 8))
        data[key.sample_log_prob] = -torch.rand(3, 8)
        data[key.advantage], data[key.value_target] = torch.randn(3, 8, 1), torch.randn(3, 8, 1)
        with computing(where if found else "torch"), torchrl.modules.set_recurrent_mode(True):
            losses = loss(data)
            sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
        found.append((loss, losses))
    names = [name for name in found[0][1].keys() if name.startswith("loss_")]
    assert set(names) == {"loss_objective", "loss_critic", "loss_entropy"}
    for name in names:
        torch.testing.assert_close(found[1][1][name], found[0][1][name], **CLOSE)
    assert_same_gradients(found[1][0], found[0][0])


def test_lstm_module_refuses(torchrl):
    _, ours = modules(torchrl)
    data = rollout()
    data["recurrent_state_c"][1, 3, 0, 2] = 0.25
    with torchrl.modules.set_recurrent_mode(True), pytest.raises(ValueError, match="'recurrent_state_c' is 0.25 there"):
        ours(data)
    for kwargs, message in ((dict(bidirectional=True), "bidirectional"), (dict(python_based=True), "python_based=True"),
                            (dict(recurrent_backend="scan"), "recurrent_backend='scan'")):
        with pytest.raises(ValueError, match=message):
            triton_lstm.rl.torchrl.LSTMModule(3, 5, in_key="a", out_key="b", **kwargs)


# CleanRL

class Spaces:
    """What an Agent of CleanRL asks its environments for."""

    class single_action_space:
        n = 4


@pytest.fixture
def cleanrl_agent():
    """The class ``Agent`` of ppo_atari_lstm.py. What the file imports for its environments and logs is left out."""
    installed("cleanrl")
    names = ("gym", "distutils", "distutils.util", "torch.utils.tensorboard", "stable_baselines3",
             "stable_baselines3.common", "stable_baselines3.common.atari_wrappers")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names}):
        sys.modules.pop("cleanrl.ppo_atari_lstm", None)
        yield importlib.import_module("cleanrl.ppo_atari_lstm").Agent


def snippets():
    """{heading: snippet} of the page."""
    return {snippet.heading: snippet for snippet in documents.snippets(PAGE)}


@on_both
def test_cleanrl(cleanrl_agent, where):
    """Losses of one update of an agent whose method is that of the page. The agent's network is convolutions over
    frames of 84 x 84; here it is one linear layer."""
    torch.manual_seed(0)
    theirs = cleanrl_agent(Spaces)
    theirs.network = torch.nn.Linear(6, 512)
    x, actions = torch.randn(24, 6) * 255, torch.randint(4, (24,))
    state, advantage, returns = [torch.randn(1, 3, 128) for _ in range(2)], torch.randn(24), torch.randn(24)

    def update(agent):
        _, log_prob, entropy, value, last = agent.get_action_and_value(x, state, STARTS.t().flatten(), actions)
        loss = -(advantage * log_prob).mean() - 0.01 * entropy.mean() + (value.view(-1) - returns).square().mean()
        loss.backward()
        return loss, value, *last

    want = update(theirs)
    own = {"envs": Spaces}
    documents.run(snippets()["CleanRL"], own)
    ours = own["agent"]
    assert type(ours) is cleanrl_agent and type(ours.lstm) is triton_lstm.LSTM
    assert cleanrl_agent.get_states is own["get_states"]
    ours.network = torch.nn.Linear(6, 512)
    ours.load_state_dict(theirs.state_dict())
    with computing(where):
        got = update(ours)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, **CLOSE)
    assert_same_gradients(ours, theirs)


# The page

@on_both
@pytest.mark.parametrize("heading", ["sb3-contrib", "TorchRL", "PufferLib"])
@pytest.mark.filterwarnings("default")              # of the libraries
def test_snippets_run_as_printed(request, heading, where):
    """That of CleanRL runs in ``test_cleanrl``."""
    fixture = {"sb3-contrib": "recurrent_ppo", "TorchRL": "torchrl"}.get(heading)
    if fixture:
        request.getfixturevalue(fixture)
    found = snippets()
    assert set(found) == {"sb3-contrib", "TorchRL", "CleanRL", "PufferLib"}
    assert all(len(snippet.text.strip().splitlines()) <= 10 for snippet in found.values())
    own = {}
    with computing(where):
        documents.run(found[heading], own)
    lstm = own["model"].policy.lstm_actor if heading == "sb3-contrib" else own["lstm"]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in lstm.parameters())
