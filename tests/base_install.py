"""Runs in an environment that holds the base install only: `make test-base`."""

import importlib.util
import sys

import torch

import mapo_fast

for name in ("diffusers", "transformers", "peft", "bitsandbytes", "pydantic", "typer"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed: this is not the base install"

assert "mapo_kernels" not in sys.modules, "import mapo_fast is not light"

assert issubclass(mapo_fast.MachineError, mapo_fast.UserError)
said = ""
try:
    mapo_fast.prepare  # noqa: B018
except ImportError as error:
    said = str(error)
assert said.startswith("mapo_fast.prepare needs "), said
assert said.endswith(": pip install 'mapo_fast[train]'"), said

loss = mapo_fast.MaPOLoss()
prediction = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
target = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(1))
out = loss(prediction, target)
out.loss.backward()
assert prediction.grad is not None
assert torch.isfinite(prediction.grad).all()
error = (prediction.detach() - target).double().square().mean(dim=(1, 2, 3))
torch.testing.assert_close(out.chosen_error.double(), error[:3], rtol=1e-6, atol=0)
torch.testing.assert_close(out.rejected_error.double(), error[3:], rtol=1e-6, atol=0)
print(f"base install: MaPOLoss runs from {mapo_fast.__file__}, loss {float(out.loss.detach()):.6f}")
