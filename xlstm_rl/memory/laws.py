"""The laws every memory core obeys, as one check for our cores and for yours.

check_memory_laws(my_core)     # raises AssertionError with the law and the error met
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from xlstm_rl.memory.core import MemoryCore
from xlstm_rl.memory.state import leaves, map_leaves, pack, take, unpack, zeros_where


def check_memory_laws(
    core: MemoryCore,
    *,
    batch_size: int = 3,
    steps: int = 7,
    reset: Tensor | None = None,
    seed: int = 0,
    tolerance: float | None = None,
) -> None:
    """Check carry, split, reset, rows, spoilt, zeros and pack on random inputs, values and gradients.

    Args:
        core: the memory, on the device and in the dtype to check (float64 shows mistakes best); put into eval mode for
            the check.
        batch_size: rows, at least 2.
        steps: sequence length, at least 2.
        reset: bool [batch_size, steps], on any device; random if not given.
        seed: of the random inputs, which are the same on every device.
        tolerance: largest error relative to the magnitude of what is compared; 1e-10 in float64, 1e-5 in float32
            unless given.

    Raises:
        AssertionError: a law is broken.
        ValueError: there are too few rows or steps.
    """
    if batch_size < 2 or steps < 2:
        raise ValueError(f"batch_size={batch_size} and steps={steps} must be at least 2, or the laws say nothing")
    was_training = core.training
    core.eval()
    try:
        _Check(core, batch_size, steps, reset, seed, tolerance).run()
    finally:
        core.train(was_training)


class _Check:
    """One random case: inputs, a state that an earlier sequence left, episode starts and a loss over all outputs."""

    def __init__(
        self, core: MemoryCore, batch_size: int, steps: int, reset: Tensor | None, seed: int, tolerance: float | None
    ) -> None:
        self.core, self.B, self.T = core, batch_size, steps
        self.generator = torch.Generator().manual_seed(seed)
        like = _first_float([*core.parameters(), *leaves(core.initial_state(1))])
        self.dtype, self.device = like.dtype, like.device
        usual = 1e-10 if self.dtype == torch.float64 else 1e-5
        self.tolerance = usual if tolerance is None else tolerance
        self.x = self._random(batch_size, steps, core.input_size)
        self.weight = self._random(batch_size, steps, core.output_size)
        drawn = torch.rand(batch_size, steps, generator=self.generator) < 0.3
        self.reset = (drawn if reset is None else reset).to(self.device)
        with torch.no_grad():
            warm_up = self._random(batch_size, 3, core.input_size)
            state = core(warm_up, core.initial_state(batch_size))[1]
        self.state = map_leaves(lambda leaf: leaf.clone(), state)
        self.state_weight = self._random(*pack(state).shape)

    def run(self) -> None:
        self._interface()
        whole = self._gradients([slice(0, self.T)])
        self._compare("carry", self._gradients([slice(t, t + 1) for t in range(self.T)]), whole)
        self._compare("carry (step)", self._gradients(None), whole)
        cut = self.T // 2
        self._compare("split", self._gradients([slice(0, cut), slice(cut, self.T)]), whole)
        self._reset_law()
        self._row_law()
        for value in (float("nan"), float("inf")):
            self._spoilt_law(value)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def _interface(self) -> None:
        core, empty = self.core, self.core.initial_state(self.B)
        _require(all(leaf.shape[0] == self.B for leaf in leaves(empty)), "every leaf of a state must start with B")
        _require(_is_zero(leaves(empty)), "zeros: the empty state must be all zeros")
        counted = pack(self.state).shape == (self.B, core.state_size)
        _require(counted, "pack: state_size must count the state's numbers")
        _assert_equal("pack/unpack", list(leaves(unpack(pack(self.state), self.state))), list(leaves(self.state)))
        before = map_leaves(lambda leaf: leaf.clone(), self.state)
        for reset in (self.reset, None):
            y, _ = core(self.x, self.state, reset)
        fits = y.shape == (self.B, self.T, core.output_size)
        _require(fits, f"output must be [B, T, output_size], got {list(y.shape)}")
        _assert_equal("state passed in must not be changed", list(leaves(self.state)), list(leaves(before)))

    def _gradients(self, slices: list[slice] | None) -> dict[str, Tensor]:
        """Output, final state and gradients of a scalar of both, run slice by slice; None runs `step`."""
        x = self.x.clone().requires_grad_()
        start = map_leaves(lambda leaf: leaf.clone().requires_grad_(), self.state)
        state, outputs = start, []
        if slices is None:
            for t in range(self.T):
                y, state = self.core.step(x[:, t], state, self.reset[:, t])
                outputs.append(y.unsqueeze(1))
        else:
            for part in slices:
                y, state = self.core(x[:, part], state, self.reset[:, part])
                outputs.append(y)
        return self._collect(torch.cat(outputs, 1), state, x, start)

    def _collect(self, y: Tensor, state: Any, x: Tensor, start: Any) -> dict[str, Tensor]:
        final = pack(state)
        inputs = {"x": x} | {f"initial state {i}": leaf for i, leaf in enumerate(leaves(start))}
        inputs |= dict(self.core.named_parameters())
        loss = (y * self.weight).sum() + (final * self.state_weight).sum()
        wanted = {name: value for name, value in inputs.items() if value.requires_grad}
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        result = {"output": y.detach(), "final state": final.detach()}
        for (name, value), gradient in zip(wanted.items(), gradients, strict=True):
            result[f"gradient of {name}"] = torch.zeros_like(value) if gradient is None else gradient
        return result

    def _compare(self, law: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        for name, value in expected.items():
            if value.numel() == 0:
                continue
            error = _largest(actual[name] - value)
            allowed = self.tolerance * max(1.0, _largest(value))
            # not the other way round: NaN must fail
            _require(error <= allowed, f"{law}: {name} is off by {error:.1e}, allowed {allowed:.1e}")

    def _reset_law(self) -> None:
        """From an episode start on, all equals a fresh state, whatever was carried there, NaN included."""
        for t in sorted({0, self.T // 2, self.T - 1}):
            everywhere = torch.zeros_like(self.reset)
            everywhere[:, t] = True
            poisoned = self.x.clone()
            poisoned[:, :t] *= 3
            x = poisoned.requires_grad_()
            spoilt = float("nan") if t == 0 else 1.0
            start = map_leaves(lambda leaf, spoilt=spoilt: (leaf + spoilt).requires_grad_(), self.state)
            y, state = self.core(x, start, everywhere)
            fresh_y, fresh_state = self.core(self.x[:, t:], self.core.initial_state(self.B))
            self._compare(
                f"reset at {t}" + (", where the state before holds NaN" if t == 0 else ""),
                {"output": y[:, t:].detach(), "final state": pack(state).detach()},
                {"output": fresh_y.detach(), "final state": pack(fresh_state).detach()},
            )
            targets = [x, *leaves(start)]
            after = (y[:, t:] * self.weight[:, t:]).sum() + (pack(state) * self.state_weight).sum()
            if not after.requires_grad:
                continue
            gradients = torch.autograd.grad(after, targets, allow_unused=True)
            before = [g for g in (gradients[0][:, :t], *gradients[1:]) if g is not None]
            _require(_is_zero(before), f"reset at {t}: a gradient crosses the episode start")
        emptied = zeros_where(torch.ones_like(self.reset[:, 0]), self.state)
        y, _ = self.core(self.x, emptied)
        fresh_y, _ = self.core(self.x, self.core.initial_state(self.B))
        _assert_equal("zeros", [y], [fresh_y])

    def _row_law(self) -> None:
        """A row's result does not depend on the rest of the batch."""
        with torch.no_grad():
            y, state = self.core(self.x, self.state, self.reset)
            for row in range(self.B):
                rows = slice(row, row + 1)
                alone_y, alone_state = self.core(self.x[rows], take(self.state, rows), self.reset[rows])
                self._compare(
                    f"rows (row {row})",
                    {"output": alone_y, "final state": pack(alone_state)},
                    {"output": y[rows], "final state": pack(state)[rows]},
                )

    def _spoilt_law(self, value: float) -> None:
        """An input that is not finite reaches no step before it, no later episode and no other row."""
        at, again = (self.T - 1) // 2, self.T - 1
        reset = self.reset.clone()
        reset[0, at + 1 : again] = False
        reset[0, again] = True
        clean = torch.ones_like(reset)
        clean[0, at:again] = False
        spoilt = self.x.clone()
        spoilt[0, at] = value
        law = f"spoilt (by {value})"
        for start in (False, True):
            reset[0, at] = start
            expected = self._clean_part(self.x, reset, clean, start)
            self._compare(law, self._clean_part(spoilt, reset, clean, start), expected)
        outputs, state = [], self.state
        with torch.no_grad():
            for t in range(self.T):
                y, state = self.core.step(spoilt[:, t], state, reset[:, t])
                outputs.append(y)
        found = {"output": _chosen(clean, torch.stack(outputs, 1)), "final state": pack(state)}
        self._compare(f"{law}, step", found, {name: expected[name] for name in found})

    def _clean_part(self, x: Tensor, reset: Tensor, clean: Tensor, gradients: bool) -> dict[str, Tensor]:
        """Outputs of the steps marked in `clean` [B, T], final state, and gradients of both by what they depend on.

        Gradients are held to the law across episodes only: within one, zero times NaN may reach the steps before.
        """
        x = x.clone().requires_grad_()
        start = map_leaves(lambda leaf: leaf.clone().requires_grad_(), self.state)
        y, state = self.core(x, start, reset)
        y, final = _chosen(clean, y), pack(state)
        loss = (y * self.weight).sum() + (final * self.state_weight).sum()
        result = {"output": y.detach(), "final state": final.detach()}
        if not gradients or not loss.requires_grad:
            return result
        by_x, *by_state = torch.autograd.grad(loss, [x, *leaves(start)], allow_unused=True, materialize_grads=True)
        result |= {f"gradient of initial state {i}": gradient for i, gradient in enumerate(by_state)}
        return result | {"gradient of x": _chosen(clean, by_x)}


def _chosen(steps: Tensor, x: Tensor) -> Tensor:
    """Those steps of x [B, T, ...] that are marked in `steps` [B, T], zeros elsewhere."""
    return torch.where(steps.unsqueeze(-1), x, torch.zeros_like(x))


def _assert_equal(law: str, actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        if not _is_equal(a, e):
            raise AssertionError(f"{law}: tensors differ by up to {_largest(a - e):.1e}")


def _require(holds: bool, law: str) -> None:
    # no `assert`, which python -O leaves out
    if not holds:
        raise AssertionError(law)


def _first_float(tensors: Iterable[Tensor]) -> Tensor:
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))


# All that reads values follows; a device without values can run the rest.


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


def _is_zero(tensors: Iterable[Tensor]) -> bool:
    return not any(tensor.count_nonzero() for tensor in tensors)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
