"""The order of copies, on a GPU and on pretended streams that run as late and as mixed up as they may."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mapo_fast.engine.layouts import apply_layout
from mapo_fast.engine.offload_activations import ActivationOffload
from mapo_fast.engine.stream_weights import WeightStreaming
from mapo_fast.engine.transfers import Transfers
from mapo_fast.models.patch import patch_unet
from mapo_fast.util.errors import UserError
from tests.unets import make_unet, run


class _Stream:
    """Work that waits to be done; an event is a list that becomes true when it has happened."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.queue: deque[tuple[list[bool], Callable[[], Any] | None]] = deque()

    def add(self, work: Callable[[], Any]) -> None:
        self.queue.append(([], work))

    def record_event(self) -> list[bool]:
        event: list[bool] = []
        self.add(lambda: event.append(True))
        return event

    def wait_event(self, event: list[bool]) -> None:
        self.queue.append((event, None))

    def wait_stream(self, stream: _Stream) -> None:
        self.wait_event(stream.record_event())

    def ready(self) -> bool:
        return bool(self.queue) and (self.queue[0][1] is not None or bool(self.queue[0][0]))

    def work(self) -> None:
        _, work = self.queue.popleft()
        if work is not None:
            work()


class _DeviceTensor(Tensor):
    """Its copies run on the stream that is current when they are asked for."""

    stream: _Stream

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:  # type: ignore[override]
        assert non_blocking
        _DeviceTensor.stream.add(lambda: super(_DeviceTensor, self).copy_(source))
        return self


class _Gpu:
    """Pretended streams under torch.cuda's names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compute = _DeviceTensor.stream = _Stream()
        self.streams = [self.compute]
        monkeypatch.setattr(torch.cuda, "Stream", self._new)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.compute)
        monkeypatch.setattr(torch.cuda, "stream", self._on)

    def _new(self, device: torch.device) -> _Stream:
        self.streams.append(_Stream())
        return self.streams[-1]

    @contextmanager
    def _on(self, stream: _Stream) -> Iterator[None]:
        _DeviceTensor.stream = stream
        yield
        _DeviceTensor.stream = self.compute

    def run(self, rng: random.Random) -> None:
        while ready := [stream for stream in self.streams if stream.ready()]:
            rng.choice(ready).work()
        assert not any(stream.queue for stream in self.streams), "deadlock"


def _tensor(value: float) -> Tensor:
    return torch.full((4,), value).as_subclass(_DeviceTensor)


def _values(*tensors: Tensor) -> list[float]:
    return [float(t[0]) for t in tensors]


@pytest.mark.parametrize("seed", range(30))
def test_copies_are_behind_what_they_depend_on(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Gpu(monkeypatch)
    transfers = Transfers(torch.device("cuda"))
    a, b, c = _tensor(0), _tensor(0), _tensor(0)  # on the device
    home, away, result = _tensor(7), _tensor(0), _tensor(0)  # on the host
    device.compute.add(lambda: a.fill_(1))
    transfers.store(away, a)  # what was computed before
    transfers.fetch(a[:], home)  # not before a is stored; by another view of it
    ticket = transfers.fetch(b, away)  # not before away has arrived
    transfers.wait(ticket)
    assert ticket.tensors == ()
    device.compute.add(lambda: c.add_(b))
    transfers.store(result, c)
    late = transfers.store(away, c)  # not before away was fetched
    transfers.wait(late)
    device.compute.add(lambda: c.fill_(9))  # allowed only after the wait
    device.run(random.Random(seed))
    assert _values(away, a, b, result, home, c) == [1, 7, 1, 1, 7, 9]


@pytest.mark.parametrize("seed", range(10))
def test_without_the_wait_it_goes_wrong(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretended GPU can tell."""
    found = set()
    for attempt in range(20):
        device = _Gpu(monkeypatch)
        transfers = Transfers(torch.device("cuda"))
        a, b, home = _tensor(0), _tensor(0), _tensor(7)
        transfers.fetch(a, home)
        device.compute.add(lambda b=b, a=a: b.add_(a))
        device.run(random.Random(100 * seed + attempt))
        found.add(float(b[0]))
    assert found == {0.0, 7.0}


def test_both_directions_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Gpu(monkeypatch)
    transfers = Transfers(torch.device("cuda"))
    a, b, home, away = _tensor(1), _tensor(0), _tensor(7), _tensor(0)
    transfers.store(away, a)
    transfers.fetch(b, home)
    _, inwards, _ = device.streams
    for stream in (device.compute, inwards):
        while stream.ready():
            stream.work()
    assert _values(b, away) == [7, 0]  # unrelated copies do not wait for each other


def test_a_ticket_keeps_device_memory_until_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _Gpu(monkeypatch)
    transfers = Transfers(torch.device("cuda"))
    a, host = _tensor(1), _tensor(0)
    ticket = transfers.store(host, a)
    assert ticket.tensors == (host, a)
    assert len(transfers._last) == 2
    transfers.wait(ticket)
    transfers.wait(ticket)
    assert ticket.tensors == ()


def test_large_host_memory_is_pinned_as_it_is_and_unpinned_with_its_last_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: dict[int, int] = {}
    calls: list[str] = []

    def unregister(address: int) -> None:
        assert _mapped(address)
        calls.append("unpin")
        del pinned[address]

    cudart = SimpleNamespace(
        cudaHostRegister=lambda address, nbytes, flags: pinned.update({address: nbytes}),
        cudaHostUnregister=unregister,
    )
    _Gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    host = Transfers(torch.device("cuda")).empty_host((3, 200_001), torch.bfloat16)
    assert pinned == {host.data_ptr(): 3 * 200_001 * 2}
    host.fill_(2.5)
    part = host[1:].view(torch.uint8)
    del host
    assert pinned
    assert torch.equal(part.view(torch.bfloat16), torch.full((2, 200_001), 2.5, dtype=torch.bfloat16))
    del part
    assert not pinned
    assert calls == ["synchronize", "unpin"]


def _mapped(address: int) -> bool:
    """Whether the process has a page there; True where that cannot be seen."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return True
    ranges = (line.split()[0].split("-") for line in maps.read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def test_a_driver_that_pins_no_more_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> None:
        raise RuntimeError("out of memory (2)")

    cudart = SimpleNamespace(
        cudaHostRegister=lambda address, nbytes, flags: 2,
        cudaHostUnregister=lambda address: pytest.fail("it was never pinned"),
    )
    _Gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", refuse)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(UserError, match=r"2 MiB more of system RAM cannot be pinned .*out of memory \(2\)"):
        Transfers(torch.device("cuda")).empty_host((1 << 21,), torch.uint8)


class TestGpu:
    pytestmark = pytest.mark.gpu

    def test_copies_wait_for_a_busy_compute_stream(self) -> None:
        transfers = Transfers(torch.device("cuda"))
        host = transfers.empty_host((1 << 22,), torch.float32)
        other = transfers.empty_host((1 << 22,), torch.float32)
        assert host.is_pinned()
        assert other[5:].is_pinned()
        host.fill_(3)
        device, second = torch.zeros(2, 1 << 22, device="cuda")
        for round_ in range(5):
            torch.cuda._sleep(20_000_000)
            device += 1
            transfers.store(other, device)
            transfers.fetch(device, host)
            ticket = transfers.fetch(second, other)
            transfers.wait(ticket)
            assert bool((second == (1 if round_ == 0 else 4)).all())
            transfers.synchronize()
            assert bool((other == (1 if round_ == 0 else 4)).all())
            assert bool((device == 3).all())

    @pytest.mark.parametrize("layout", ["joint", "split"])
    def test_a_streamed_unet_gives_the_gradients_of_a_resident_one(
        self, layout: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mapo_fast.engine.offload_activations.OFFLOADED_BYTES", 1)
        monkeypatch.setattr("mapo_fast.engine.stream_weights.STREAMED_BYTES", 600)
        truth = run(patch_unet(make_unet("sdxl").cuda()), "sdxl", torch.float64)
        unet = patch_unet(make_unet("sdxl"))
        transfers = Transfers(torch.device("cuda"))
        WeightStreaming(unet, transfers)
        offload = ActivationOffload(transfers)
        apply_layout(unet, layout, gradient_checkpointing=True, offload=offload)
        for _ in range(3):
            measured = run(unet, "sdxl", torch.float64)
            offload.reset()
            for name, expected in truth.items():
                assert float((measured[name] - expected).norm()) <= 1e-10 * float(expected.norm()), name
