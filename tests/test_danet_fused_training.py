"""The same network with fused and with eager attention: it computes and learns the same, as far as roundings allow."""

import numpy as np
import pytest
import torch

import danet_kernels
from danet import create_model
from danet.data.street_scenes import render
from danet.data.transforms import to_tensor
from danet.loss import segmentation_loss

FUSED = "native"
SIZE = (64, 128)


@pytest.fixture(autouse=True)
def _needs_the_extension():
    reasons = danet_kernels.available_backends("position_attention")[FUSED]
    if reasons:
        pytest.skip("; ".join(reasons))


def network(backend: str, variant="danet", dtype=torch.float64):
    """The same weights for every backend, with gammas at which attention matters."""
    torch.manual_seed(0)
    model = create_model(f"{variant}_tiny", 19, attention_backend=backend, dropout=0.0).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    return model


def batch(step: int, dtype=torch.float64):
    samples = [render(np.random.default_rng((step, index)), *SIZE) for index in range(2)]
    images = torch.stack([to_tensor(sample.image) for sample in samples]).to(dtype)  # [2, 3, H, W]
    return images, torch.stack([torch.from_numpy(sample.mask) for sample in samples])  # uint8 [2, H, W]


def learn(backend: str, steps: int, dtype=torch.float64, *, bf16=False):
    """Losses of the steps, and the model after them."""
    model = network(backend, dtype=dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(steps):
        images, target = batch(step, dtype)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(images)
        loss = segmentation_loss(logits, target).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def test_attention_matters_here():
    """Else nothing below could fail."""
    images, target = batch(0)
    model = network(FUSED).train()
    with_attention = segmentation_loss(model(images), target).total
    with torch.no_grad():
        model.head.position_attention.gamma.zero_()
    without = segmentation_loss(model(images), target).total
    assert abs(with_attention - without) > 1e-3


def test_50_steps_in_fp64():
    fused, fused_model = learn(FUSED, 50)
    eager, eager_model = learn("eager", 50)
    assert fused == pytest.approx(eager, rel=1e-6)
    assert eager[-1] < 0.7 * eager[0]
    expected = eager_model.state_dict()
    for name, tensor in fused_model.state_dict().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def first_step(backend: str, dtype):
    model = network(backend, dtype=dtype).train()
    images, target = batch(0, dtype)
    loss = segmentation_loss(model(images), target).total
    loss.backward()
    return loss.item(), {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def test_the_first_step_in_fp32():
    """Every gradient within three times the error of eager attention, elementwise and in norm.

    So the error rule (danet_kernels/_error_rule.py) judges gradients of one call; here eager in fp32 is its ideal.
    """
    exact_loss, exact = first_step("eager", torch.float64)
    eager_loss, eager = first_step("eager", torch.float32)
    fused_loss, fused = first_step(FUSED, torch.float32)
    assert fused_loss == pytest.approx(eager_loss, rel=1e-5)
    assert fused_loss == pytest.approx(exact_loss, rel=1e-5)
    for name, gradient in exact.items():
        ideal, error = (eager[name] - gradient).abs(), (fused[name] - gradient).abs()
        ulp = torch.finfo(torch.float32).eps * gradient.abs().max()
        worst = np.unravel_index(error.argmax().item(), error.shape)
        assert error.max() <= 3 * ideal.max() + ulp, (name, worst, error.max(), ideal.max())
        assert error.norm() <= 3 * ideal.norm() + ulp, (name, error.norm(), ideal.norm())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_40_steps_come_to_the_same_loss(bf16):
    means = []
    for backend in (FUSED, "eager"):
        losses, _ = learn(backend, 40, torch.float32, bf16=bf16)
        assert losses[-1] < 0.7 * losses[0]
        means.append(np.mean(losses[-10:]))
    assert means[0] == pytest.approx(means[1], rel=0.05)


def logits(backend: str, variant: str, dtype):
    model = network(backend, variant, dtype).eval()
    with torch.inference_mode():
        return model(batch(0, dtype)[0]).double()


def test_logits_with_position_attention():
    torch.testing.assert_close(
        logits(FUSED, "pam", torch.float32), logits("eager", "pam", torch.float32), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("variant", ["cam", "danet"])
def test_logits_with_channel_attention(variant):
    """A sharp softmax of large Gram sums: eager's own error is the measure."""
    exact = logits("eager", variant, torch.float64)
    ours, eager = ((logits(backend, variant, torch.float32) - exact).abs().max() for backend in (FUSED, "eager"))
    assert ours <= 2 * eager
