"""Examples made elsewhere: undefended models, other rows, files, a distilled surrogate."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from robustdeq.attacks.apgd import APGD
from robustdeq.attacks.distill import Distill, labels_alone, standardized, surrogate
from robustdeq.attacks.transfer import Transfer, TransferRows
from robustdeq.attacks.transfer_file import TransferFile
from safetensors.torch import save_file
from torch import Tensor, nn
from toys import Linear, ToyEquilibrium

import robustdeq
from robustdeq.datasets import load_slice, spec_of
from robustdeq.equilibrium import EquilibriumClassifier
from robustdeq.errors import UsageError
from robustdeq.interfaces import Candidates, Scope, trained_form
from robustdeq.randomness import SampleRandom
from robustdeq.registry import load
from robustdeq.targets import Pool, Target
from robustdeq.threats import Norm, Threat

CPU = torch.device("cpu")
THREATS = ["Linf:0.008", "L2:0.05"]


class Masked(nn.Module):
    """A classifier without a gradient; what stands behind it is offered where `offers` is set."""

    def __init__(self, base: nn.Module, form: Any = None, offers: bool = True) -> None:
        super().__init__()
        self.base, self.form, self.offers, self.queries = base, form, offers, 0

    def undefended(self) -> dict[str, nn.Module]:
        return {"base": self.base} if self.offers else {}

    def forward(self, x: Tensor) -> Tensor:
        self.queries += len(x)
        logits = self.base(x.detach()).detach()
        return logits if self.form is None else self.form(logits)


def exactly_robust(model: Linear, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Margin > eps * dual norm, for images well inside of the box."""
    difference = model.weight[y][:, None] - model.weight[None]
    norm = difference.abs().sum(2) if threat.norm is Norm.LINF else difference.norm(dim=2)
    logits = model(x)
    slack = logits.gather(1, y[:, None]) - logits - threat.eps * norm
    slack[torch.arange(len(y)), y] = torch.inf
    return slack.amin(1).detach() > 0


def run(
    attack: Any, model: nn.Module, x: Tensor, y: Tensor, threat: Threat | str, pools: Any = ()
) -> Tensor:
    """Candidates, all of them admissible."""
    threat = Threat.parse(threat) if isinstance(threat, str) else threat
    with torch.no_grad():
        classes = model(x[:1].to(next(model.parameters()).dtype)).shape[1]
    target = Target(model, classes, pools=pools)
    before = torch.get_rng_state()
    out = attack.run(target, x.clone(), y, threat, SampleRandom(0, "t", range(len(x))))
    assert torch.equal(before, torch.get_rng_state())
    found = out.x if isinstance(out, Candidates) else out
    assert not any(threat.violations(x, found))
    return found


def digits(n: int) -> tuple[Tensor, Tensor]:
    data = load_slice("digits", "test", n)
    return torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)


# What defenses offer as undefended.

SMALL: dict[str, Any] = {"width": 16, "inner": 16, "gain": 0.8}
OFFERS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("neural_dynamics", {"regulation": "entropy"}, {"base"}),
    ("neural_dynamics", {"regulation": "random_sign"}, {"base"}),
    ("neural_dynamics", {"output": "ensemble"}, {"final"}),
    ("neural_dynamics", {}, set()),
    ("lyadeq", {"hidden": 8}, {"backbone"}),
    ("lyadeq", {"hidden": 8, "reading": "dynamics"}, {"backbone"}),
    ("lyadeq", {"hidden": 8, "reading": "centered"}, {"backbone"}),
    ("lyadeq", {"stability": "none"}, set()),
    ("lyadeq", {"stability": "scale"}, set()),
    ("deq", {}, set()),
]


@pytest.mark.parametrize(("defense", "parameters", "names"), OFFERS)
def test_what_stands_behind_a_defense_shares_its_weights(
    defense: str, parameters: dict[str, Any], names: set[str]
) -> None:
    torch.manual_seed(0)
    model = load("defense", defense, {**SMALL, **parameters}).build(spec_of("digits"), CPU).eval()
    state, (x, _) = list(model.state_dict()), digits(6)
    offered = Target(model, 10).undefended()
    assert set(offered) == names
    assert Transfer().fits(Target(model, 10)) == bool(names)
    own = {id(parameter) for parameter in model.parameters()}
    for target in offered.values():
        assert isinstance(target.model, EquilibriumClassifier)
        assert {id(parameter) for parameter in target.model.parameters()} <= own
        with torch.no_grad():
            plain = target(x).logits
        with torch.inference_mode():
            torch.testing.assert_close(target(x).logits, plain, rtol=0, atol=0)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(target(leaf).logits.logsumexp(1).sum(), leaf)
        assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    assert list(model.state_dict()) == state


@pytest.mark.parametrize("form", [{"regulation": "entropy"}, {"output": "ensemble"}])
def test_behind_a_purifier_stands_the_model_that_was_trained(form: dict[str, Any]) -> None:
    defense, (x, _) = load("defense", "neural_dynamics", {**SMALL, **form}), digits(6)
    torch.manual_seed(0)
    model = defense.build(spec_of("digits"), CPU)
    trained = trained_form(defense).build(spec_of("digits"), CPU)
    trained.load_state_dict(model.state_dict())
    (behind,) = Target(model, 10).undefended().values()
    with torch.no_grad():
        torch.testing.assert_close(behind(x).logits, trained(x), rtol=0, atol=0)
        assert not torch.allclose(model(x), trained(x), atol=1e-4)


@pytest.mark.parametrize("reading", ["module", "dynamics", "centered"])
def test_behind_the_lyapunov_module_stands_the_fixed_point_under_the_same_head(
    reading: str,
) -> None:
    torch.manual_seed(0)
    defense = load("defense", "lyadeq", {**SMALL, "hidden": 8, "reading": reading})
    model: Any = defense.build(spec_of("digits"), CPU)
    x, _ = digits(6)
    (behind,) = Target(model, 10).undefended().values()
    with torch.no_grad():
        u = model.stem(x)
        z = torch.zeros_like(u)
        for _ in range(300):
            z = torch.relu(u + model.gain * model.residual(z))
        expected = model.settings.temperature * model.head(model.pool(z))
        torch.testing.assert_close(behind(x).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(x), expected, atol=1e-2)


def test_the_stabilizer_can_be_differentiated_otherwise_by_its_name() -> None:
    torch.manual_seed(0)
    model: Any = load("defense", "lyadeq", {**SMALL, "hidden": 8}).build(spec_of("digits"), CPU)
    names = dict(model.named_modules())
    assert {"stabilizer", "stabilizer.gate"} <= set(names)
    x, (gate,) = digits(3)[0], [names["stabilizer.gate"]]
    with torch.no_grad():
        expected = model(x)
        handle = gate.register_forward_hook(lambda module, inputs, output: 0.0 * output)
        ungated = model(x)
        handle.remove()
    behind = Target(model, 10).undefended()["backbone"]
    with torch.no_grad():
        torch.testing.assert_close(ungated, behind(x).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, ungated, atol=1e-2)


# Transfer from undefended models.


@pytest.mark.parametrize("threat", THREATS)
def test_transfer_reaches_behind_a_mask_what_the_base_loses(
    threat: str, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    model = Masked(linear)
    exact = exactly_robust(linear, x, y, Threat.parse(threat))
    by_gradient = model(run(APGD(steps=20), model, x, y, threat)).argmax(1) == y
    left = model(run(Transfer(steps=40), model, x, y, threat)).argmax(1) == y
    assert 0.2 < float(exact.float().mean()) < 0.9
    assert int(by_gradient.sum()) > int(exact.sum()) + 5
    assert torch.equal(left, exact)


def test_transfer_of_a_sample_does_not_depend_on_its_companions(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    target, threat = Target(Masked(linear), 4), Threat.parse("Linf:0.008")
    attack = Transfer(steps=6, restarts=2, polish=3)
    whole = attack.run(target, x, y, threat, SampleRandom(0, "t", range(24))).x
    part = attack.run(target, x[7:9], y[7:9], threat, SampleRandom(0, "t", [7, 8])).x
    torch.testing.assert_close(whole[7:9], part)


def test_transfer_says_which_model_and_loss_made_an_example(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    verdict = robustdeq.evaluate(
        Masked(linear), x, y, threat="Linf:0.02", attacks=[Transfer(steps=10)]
    )
    names = set(verdict.samples["broken_by"].dropna())
    assert names
    assert all(name.startswith("transfer/transfer-base-") for name in names)
    assert any(flag.startswith("black_box_beats_gradients") for flag in verdict.flags)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"restarts": 0}, {"targets": 0}, {"polish": -1}])
def test_numbers_that_are_too_small_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="give at least"):
        load("attack", "transfer", wrong)


# Other rows' examples.


def towards_the_boundary(model: Linear, x: Tensor, y: Tensor, length: float) -> Tensor:
    """Perturbations along the difference of two rows of the weight, to the likeliest class."""
    logits = model(x).scatter(1, y[:, None], -torch.inf)
    direction = (model.weight[logits.argmax(1)] - model.weight[y]).detach().view_as(x)
    return length * direction / direction.abs().amax((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("length", [1e-4, 0.3])
def test_examples_of_other_threats_are_brought_to_the_edge_of_the_ball(
    threat: str, length: float, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    """Too short or far too long: a perturbation of the right direction breaks what it can."""
    x, y = linear_data
    available = torch.arange(24) % 2 == 0
    pool = Pool("other", x + towards_the_boundary(linear, x, y, length), available)
    model = Masked(linear, offers=False)
    found = run(TransferRows(), model, x, y, threat, [pool])
    broken = model(found).argmax(1) != y
    logits = linear(x).scatter(1, y[:, None], -torch.inf)
    two = torch.stack([y, logits.argmax(1)], 1)
    difference = linear.weight[two[:, 0]] - linear.weight[two[:, 1]]
    parsed = Threat.parse(threat)
    norm = difference.abs().sum(1) if parsed.norm is Norm.LINF else difference.norm(dim=1)
    gap = linear(x).gather(1, two)
    breakable = (gap[:, 0] - gap[:, 1] < parsed.eps * norm) & available
    assert 3 < int(breakable.sum()) < 12
    assert bool((broken >= breakable).all())
    assert torch.equal(found[~available], x[~available])


def test_examples_that_are_no_numbers_do_no_harm(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    good = x + towards_the_boundary(linear, x, y, 0.02)
    available = torch.ones(24, dtype=torch.bool)
    blank = Pool("blank", torch.full_like(x, torch.nan), available)
    model = Masked(linear)
    with_it = run(TransferRows(), model, x, y, "Linf:0.02", [blank, Pool("a", good, available)])
    without = run(TransferRows(), model, x, y, "Linf:0.02", [Pool("a", good, available)])
    assert torch.equal(with_it, without)
    assert torch.equal(run(TransferRows(), model, x, y, "Linf:0.02", [blank]), x)
    assert torch.equal(run(TransferRows(), model, x, y, "Linf:0.02"), x)


def test_a_short_ascent_goes_on_from_a_transferred_example(
    linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    threat, available = Threat.parse("Linf:0.008"), torch.ones(24, dtype=torch.bool)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    pool = [Pool("noise", x + noise, available)]
    exact = exactly_robust(linear, x, y, threat)
    left = [
        linear(run(TransferRows(polish=k), linear, x, y, threat, pool)).argmax(1) == y
        for k in (0, 40)
    ]
    # Ascent towards the nearest class can hover where two classes meet.
    assert int(exact.sum()) <= int(left[1].sum()) <= int(exact.sum()) + 1
    assert int(left[0].sum()) > int(left[1].sum()) + 2
    assert TransferRows.phase == 2


# Files of examples.


def stored(path: Path, x: Tensor, index: Tensor) -> TransferFile:
    if path.suffix == ".npz":
        np.savez(path, x=x.numpy(), index=index.numpy())
    else:
        save_file({"x": x.contiguous(), "index": index}, path)
    return TransferFile(path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_stored_examples_are_tried_where_they_belong(
    suffix: str, tmp_path: Path, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    """In any order and precision, several for one image and none for another."""
    x, y = linear_data
    good = x + 0.02 * towards_the_boundary(linear, x, y, 1.0).sign()
    order = torch.tensor([5, 3, 3, 900, 8])
    examples = torch.stack([good[5], x[3], good[3], good[0], good[8]]).double()
    attack = stored(tmp_path / f"examples{suffix}", examples, order)
    model = Masked(linear)
    found = run(attack, model, x, y, "Linf:0.02")
    torch.testing.assert_close(found[[3, 5, 8]], good[[3, 5, 8]])
    others = [k for k in range(24) if k not in (3, 5, 8)]
    assert torch.equal(found[others], x[others])


def test_a_flipped_byte_is_noticed_before_the_file_is_opened(
    tmp_path: Path, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    x, y = linear_data
    attack = stored(tmp_path / "e.safetensors", x, torch.arange(24))
    path = Path(attack.path)
    payload = bytearray(path.read_bytes())
    payload[0] ^= 1  # in the header: opening it would fail in another way
    path.write_bytes(payload)
    with pytest.raises(UsageError, match="has sha256"):
        run(attack, linear, x, y, "Linf:0.02")
    path.unlink()
    with pytest.raises(UsageError, match="No such file"):
        run(attack, linear, x, y, "Linf:0.02")


@pytest.mark.parametrize(
    ("x", "index", "message"),
    [
        (torch.rand(2, 1, 7, 7), torch.arange(2), "made for this data set"),
        (torch.rand(2, 64), torch.arange(2), "of shape"),
        (torch.ones(2, 1, 8, 8, dtype=torch.uint8), torch.arange(2), "floating-point images"),
        (torch.rand(2, 1, 8, 8), torch.arange(3), "store 2 integers"),
        (torch.rand(2, 1, 8, 8), torch.rand(2), "store 2 integers"),
    ],
)
def test_files_of_another_form_are_refused(
    x: Tensor,
    index: Tensor,
    message: str,
    tmp_path: Path,
    linear: Linear,
    linear_data: tuple[Tensor, Tensor],
) -> None:
    for suffix in (".npz", ".safetensors"):
        attack = stored(tmp_path / f"e{suffix}", x, index)
        with pytest.raises(UsageError, match=message):
            run(attack, linear, *linear_data, "Linf:0.02")


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_pickles_are_refused(
    suffix: str, tmp_path: Path, linear: Linear, linear_data: tuple[Tensor, Tensor]
) -> None:
    path = tmp_path / f"e{suffix}"
    payloads = [pickle.dumps(Bomb()), b"", b"PK\x03\x04"]
    if suffix == ".npz":
        np.savez(path, x=np.array([Bomb()], dtype=object), index=np.arange(1))
        payloads.append(path.read_bytes())
        np.savez(path, index=np.arange(1))
        payloads.append(path.read_bytes())
    for payload in payloads:
        path.write_bytes(payload)
        attack = TransferFile(path=str(path), sha256=hashlib.sha256(payload).hexdigest())
        with pytest.raises(UsageError, match=r"cannot be read|holds no array 'x'"):
            run(attack, linear, *linear_data, "Linf:0.02")
    with pytest.raises(UsageError, match=r"name a \.safetensors"):
        TransferFile(path="examples.pt", sha256="0" * 64)
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        load("attack", "transfer_file", {"path": str(path)})


# A surrogate.


def test_a_model_without_gradient_falls_to_its_surrogate() -> None:
    """Digits, n = 100, Linf:0.1: within five points of what white-box attacks leave of the base."""
    x, y = digits(100)
    base = robustdeq.load_model("Standard_feedforward")
    threat = Threat.parse("Linf:0.1")
    model = Masked(base, offers=False)
    attack = Distill(rounds=2)
    found = run(attack, model, x, y, threat)
    assert model.queries <= 100 * attack.budget(10).forward + 1
    left = int((base(found).argmax(1) == y).sum())
    white_box = int((base(run(APGD(loss="margin"), base, x, y, threat)).argmax(1) == y).sum())
    by_gradient = run(APGD(steps=5), model, x, y, threat)
    assert int((base(by_gradient).argmax(1) == y).sum()) > white_box + 20
    assert white_box < 60
    assert left <= white_box + 5


class Noisy(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * torch.randn(len(x), len(self.weight))


QUICK: dict[str, int] = {"points": 4, "rounds": 2, "fit": 15, "steps": 5}
MODELS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (Linear(16, 2), (1, 4, 4)),
    (Linear(3, 3), (3, 1, 1)),
    (Linear(3 * 28 * 28, 5), (3, 28, 28)),
    (Linear(17 * 16, 4), (1, 17, 16)),
    (ToyEquilibrium(pixels=16), (1, 4, 4)),
    (Noisy(64, 4), (1, 8, 8)),
]


@pytest.mark.parametrize(("model", "shape"), MODELS)
@pytest.mark.parametrize("threat", ["Linf:0.1", "L2:0.5"])
def test_any_module_can_be_distilled_and_twice_alike(
    model: nn.Module, shape: tuple[int, ...], threat: str
) -> None:
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x.double() if isinstance(model, ToyEquilibrium) else x).argmax(1)
    once = run(Distill(**QUICK), model, x, y, threat)
    assert torch.equal(once, run(Distill(**QUICK), model, x, y, threat))
    assert Distill.scope is Scope.CHUNK


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 17, 29), (3, 32, 32), (1, 3, 40)])
def test_the_surrogate_fits_any_shape(shape: tuple[int, int, int]) -> None:
    network = surrogate(torch.Size(shape), 7)
    assert network(torch.rand(2, *shape)).shape == (2, 7)


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-6, 1.0, 1e6]), soft=st.booleans())
def test_standardized_answers_keep_the_order_of_the_classes(
    seed: int, scale: float, soft: bool
) -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
    raw = logits.softmax(1) if soft else scale * (logits + 100)
    answers = standardized(raw)
    assert bool(answers.isfinite().all())
    assert 0.3 < float(answers.abs().median()) < 3
    ordered = answers.gather(1, raw.argsort(1))
    assert bool((ordered.diff(dim=1) >= 0).all())
    assert not labels_alone(raw)


def test_saturated_probabilities_still_tell_classes_apart() -> None:
    raw = (40 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))).softmax(1)
    assert bool((raw.amax(1) == 1).any())
    answers = standardized(raw)
    assert bool(answers.isfinite().all())
    assert float(answers.abs().max()) < 20
    one_hot = nn.functional.one_hot(raw.argmax(1), 4).float()
    assert labels_alone(one_hot)
    assert labels_alone(3 * one_hot - 1)
    assert not labels_alone(raw)
