"""The five losses of SAN: closed forms, which parameter learns from what, and the direction they lead to."""
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from dnnlib import UserError
from tests.closeness import approx, assert_close
from training.discriminators.san import (
    GAN_LOSSES,
    PlainLinear,
    SanConv2d,
    SanLinear,
    SanOutput,
    direction_objective,
    discriminator_loss,
    generator_loss,
    project_directions,
    split_linear,
)
from transport.common.study import seeded

pytestmark = pytest.mark.numeric

WEIGHTED = ("saturating", "non-saturating", "least-squares")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_raw_weight_by_hand():
    w, h = tensor(3, 4)[None].requires_grad_(), tensor(1, 2)[None].requires_grad_()
    out = split_linear(h, w)
    assert (out.fun.item(), out.dir.item()) == (approx(11), approx(11))
    fun_w, fun_h = torch.autograd.grad(out.fun, [w, h], retain_graph=True)
    dir_w, dir_h = torch.autograd.grad(out.dir, [w, h], allow_unused=True)
    assert_close(fun_w[0], tensor(1.32, 1.76), rtol=1e-7, atol=1e-7)
    assert_close(fun_h[0], tensor(3, 4), rtol=1e-7, atol=1e-7)
    assert_close(dir_w[0], tensor(-0.32, 0.24), rtol=1e-7, atol=1e-7)
    assert dir_h is None
    assert_close((fun_w + dir_w)[0], h[0].detach(), rtol=1e-7, atol=1e-7)


def test_direction_and_scale_by_hand():
    layer = SanLinear(2, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(tensor(0.6, 0.8)[None])
        layer.scale.fill_(5)
    h = tensor(1, 2)[None].requires_grad_()
    out = layer.san(h)
    leaves = [layer.weight, layer.scale, h]
    fun = torch.autograd.grad(out.fun, leaves, allow_unused=True)
    along = torch.autograd.grad(out.dir, leaves, allow_unused=True)
    assert (out.fun.item(), out.dir.item()) == (approx(11), approx(11))
    assert fun[0] is None
    assert fun[1].item() == approx(2.2)
    assert_close(fun[2][0], tensor(3, 4), rtol=1e-7, atol=1e-7)
    assert_close(along[0][0], tensor(-1.6, 1.2), rtol=1e-7, atol=1e-7)
    assert along[1:] == (None, None)


def test_steps_on_the_direction_lengthen_a_raw_weight():
    draws, rate = seeded(0, "steps"), 0.1
    w = torch.randn(1, 6, generator=draws, dtype=torch.float64)
    for _ in range(5):
        h = torch.randn(8, 6, generator=draws, dtype=torch.float64)
        w.requires_grad_()
        (grad,) = torch.autograd.grad(split_linear(h, w).dir.mean(), w)
        w = w.detach()
        assert (grad * w).sum().item() == approx(0, abs=1e-9)
        longer = w - rate * grad
        assert longer.norm().item() ** 2 == approx(w.norm().item() ** 2 + (rate * grad.norm().item()) ** 2)
        w = longer

#----------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "expected"), [
    ("wasserstein", (1, 1, 1)), ("hinge", (1, 1, 1)), ("saturating", (0.119203, 0.5, 0.880797)),
    ("non-saturating", (0.880797, 0.5, 0.119203)), ("least-squares", (5.808011, 1.920144, 0.168498))])
def test_weight_is_minus_the_derivative(name, expected):
    loss, z = GAN_LOSSES[name], tensor(-2, 0, 2).requires_grad_()
    (slope,) = torch.autograd.grad(loss.generator(z).sum(), z)
    assert_close(loss.weight(z.detach()), -slope, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(loss.weight(z.detach()), tensor(*expected), atol=1e-5, rtol=0)


def test_losses_by_hand():
    sigmoid, softplus = (lambda z: 1 / (1 + math.exp(-z))), (lambda z: math.log(1 + math.exp(z)))
    by_hand = {     # R1, R2, R3 of the paper.
        "wasserstein": (lambda z: z, lambda z: -z, lambda z: -z),
        "hinge": (lambda z: min(0, z - 1), lambda z: min(0, -1 - z), lambda z: -z),
        "saturating": (lambda z: math.log(sigmoid(z)), lambda z: math.log(1 - sigmoid(z)),
                       lambda z: math.log(1 - sigmoid(z))),
        "non-saturating": (lambda z: math.log(sigmoid(z)), lambda z: math.log(1 - sigmoid(z)),
                           lambda z: -math.log(sigmoid(z))),
        "least-squares": (lambda z: -softplus(1 - z) ** 2, lambda z: -softplus(z) ** 2, lambda z: softplus(1 - z) ** 2),
    }
    assert set(by_hand) == set(GAN_LOSSES)
    real, fake = tensor(0.3, -2, 1.7), tensor(-0.4, 1.2, 0.1)
    for name, (r1, r2, r3) in by_hand.items():
        outputs = SanOutput(real, torch.zeros(3)), SanOutput(fake, torch.zeros(3))
        base = -np.mean([r1(z) for z in real.tolist()]) - np.mean([r2(z) for z in fake.tolist()])
        assert discriminator_loss(name, *outputs).item() == approx(base), name
        assert generator_loss(name, fake).item() == approx(np.mean([r3(z) for z in fake.tolist()])), name


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_who_learns_from_what(name):
    torch.manual_seed(0)
    body, last = torch.nn.Linear(3, 5), SanLinear(5, 1)
    x, y = torch.randn(6, 3), torch.randn(6, 3) + 1
    real, fake = last.san(body(x)), last.san(body(y))
    (along,) = torch.autograd.grad(discriminator_loss(name, real, fake), last.weight, retain_graph=True)
    r_real, r_fake = (GAN_LOSSES[name].weight(out.fun.detach()) for out in (real, fake))
    r_real, r_fake = r_real / r_real.sum(), r_fake / r_fake.sum()
    step = (r_real * body(x) - r_fake * body(y)).detach().sum(dim=0) * last.scale.detach()
    w = last.weight.detach()[0]
    assert_close(-along[0], step - (step @ w) * w, atol=1e-5, rtol=1e-4)  # Tangential part of r-means.
    base = GAN_LOSSES[name].real(last(body(x))).mean() + GAN_LOSSES[name].fake(last(body(y))).mean()
    leaves = [*body.parameters(), last.scale, last.bias]
    for got, plain in zip(torch.autograd.grad(discriminator_loss(name, real, fake), leaves),
                          torch.autograd.grad(base, leaves), strict=True):
        assert_close(got, plain, rtol=1.3e-6, atol=1e-5)      # Features, scale and bias train as in the GAN.
    plain = PlainLinear(5, 1)
    expected = GAN_LOSSES[name].real(plain(body(x))).mean() + GAN_LOSSES[name].fake(plain(body(y))).mean()
    assert discriminator_loss(name, plain.san(body(x)), plain.san(body(y))).item() == approx(expected.item())


def turned(name: str, h: torch.Tensor, g: torch.Tensor, f: torch.Tensor, k: torch.Tensor,
           classes: torch.Tensor | None = None) -> torch.Tensor:
    """The gradient of the objective by a free direction when outputs are f and k, brought to length one."""
    w = torch.zeros(h.shape[1], dtype=h.dtype).requires_grad_()
    objective = direction_objective(name, SanOutput(f, h @ w), SanOutput(k, g @ w), classes, classes)
    return torch.nn.functional.normalize(torch.autograd.grad(objective, w)[0], dim=0)


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_vector_added_to_all_features_does_not_turn_the_direction(name):
    draws = seeded(0, "shift")
    h, g, f, k = (torch.randn(shape, generator=draws, dtype=torch.float64) for shape in ([50, 3], [60, 3], [50], [60]))
    shift = tensor(0, 20, 0)
    before, after = turned(name, h, g, f, k), turned(name, h + shift, g + shift, f, k)
    assert_close(before, after, atol=1e-9, rtol=0)
    raw = (GAN_LOSSES[name].weight(f) @ (h + shift) / 50 - GAN_LOSSES[name].weight(k) @ (g + shift) / 60)
    assert torch.nn.functional.normalize(raw, dim=0) @ before < 0.9         # Without normalisation it turns.


@pytest.mark.parametrize("name", WEIGHTED)
def test_classes_are_normalised_apart(name):
    draws = seeded(0, "classes")
    h, g, f, k = (torch.randn(shape, generator=draws, dtype=torch.float64) for shape in ([6, 3], [6, 3], [6], [6]))
    classes = torch.tensor([0, 0, 2, 2, 2, 2])          # A class number may be missing in a batch.
    real, fake = SanOutput(f, h[:, 0]), SanOutput(k, g[:, 0])
    together = direction_objective(name, real, fake, classes, classes)
    parts = [direction_objective(name, *(SanOutput(*(t[classes == c] for t in out)) for out in (real, fake)))
             for c in (0, 2)]
    assert together.item() == approx((2 * parts[0] + 4 * parts[1]).item() / 6)
    same = direction_objective(name, SanOutput(f[:, None], h[:, :1]), SanOutput(k[:, None], g[:, :1]), classes, classes)
    assert same.item() == approx(together.item())
    alone = torch.zeros(6, dtype=torch.int64)
    assert direction_objective(name, real, fake, alone, alone).item() == approx(
        direction_objective(name, real, fake).item())

#----------------------------------------------------------------------------

DELTA, SIGMA = np.array([1.0, 1.0]), np.diag([1.0, 100.0])


def population_optimum(name: str) -> np.ndarray:
    """The unconstrained w in R^2 at which a loss of <w, h> is least, h ~ N(+-DELTA/2, SIGMA)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()

    def risk(w: np.ndarray) -> float:
        mean, spread = w @ DELTA / 2, math.sqrt(w @ SIGMA @ w)
        if name == "hinge":
            t = (1 - mean) / spread
            return (1 - mean) * scipy.stats.norm.cdf(t) + spread * scipy.stats.norm.pdf(t)
        margin = mean + spread * nodes
        return weights @ (np.logaddexp(0, -margin) if name == "logistic" else np.square(1 - margin))

    return scipy.optimize.minimize(risk, [0.5, 0.1], method="Nelder-Mead",
                                   options={"xatol": 1e-10, "fatol": 1e-15, "maxiter": 2000}).x


@pytest.mark.parametrize("name", ["hinge", "logistic", "least squares"])
def test_a_plain_last_layer_finds_fisher_s_direction(name):
    w = population_optimum(name)
    w = w / np.linalg.norm(w)
    np.testing.assert_allclose(w, [0.99995, 0.0099995], atol=1e-5)
    assert w @ DELTA / math.sqrt(2) == pytest.approx(0.714142, abs=1e-5)


def test_a_san_layer_finds_the_difference_of_means():
    draws = seeded(0, "fisher")
    torch.manual_seed(0)
    noise = torch.randn(500, 2, generator=draws) @ torch.as_tensor(SIGMA).float().sqrt()
    noise = torch.cat([noise, -noise])              # Sample means are exact.
    half = torch.as_tensor(DELTA).float() / 2
    layer = SanLinear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.99995, 0.0099995]]))        # A GAN would stay there.
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(300):
        loss = discriminator_loss("hinge", layer.san(noise + half), layer.san(noise - half))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.scale.data.fill_(1)                   # The features stand still, and so does the scale.
        project_directions(layer)
    assert (layer.direction()[0] @ half / half.norm()).item() == pytest.approx(1, abs=1e-3)


def test_projection_reaches_every_layer():
    network = torch.nn.Sequential(SanConv2d(2, 3, 3), torch.nn.Sequential(SanLinear(4, 2)), torch.nn.Linear(2, 2))
    plain = network[2].weight.clone()
    with torch.no_grad():
        for layer in (network[0], network[1][0]):
            layer.weight.mul_(3)
    project_directions(network)
    for layer in (network[0], network[1][0]):
        assert_close(layer.row_norms().flatten(), torch.ones(len(layer.weight)), rtol=1.3e-6, atol=1e-5)
    assert torch.equal(network[2].weight, plain)


def test_unknown_name():
    with pytest.raises(UserError, match="GAN loss l2: choose from wasserstein, hinge"):
        generator_loss("l2", torch.zeros(2))
