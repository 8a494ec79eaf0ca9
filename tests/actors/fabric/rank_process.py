"""One rank of a cell, as a process that tests command; `conftest.RankPool` starts it as a script.

A command is a function here, called with the keywords that the test sent; what it returns, or the
TransportError that it raises, goes back. The experts are so simple that a reader can check them:
expert e of layer l turns a row into row * (e + 1) / (l + 1) + e.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Client
from typing import Any

import torch

from ostro.actors.errors import TransportError
from ostro.actors.fabric.colocated_exchange import ColocatedExchange
from ostro.actors.fabric.epoch import EpochGroup, Membership, join, leave
from ostro.actors.fabric.local_exchange import LocalExchange
from ostro.actors.fabric.messages import StepPlan
from ostro.actors.fabric.placement import Placement, initial_placement
from ostro.actors.fabric.row_codec import RowLayout
from ostro.actors.fabric.transport import ExpertServer, PairExchange
from ostro.actors.fabric.wiring import Wiring

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class AffineExperts:
    """The experts of one rank."""

    def __init__(self, placement: Placement, rank: int) -> None:
        self._logical_E = torch.tensor([*placement.local_to_logical(rank), 0])

    def __call__(self, layer, rows_RD, expert_RK, weight_RK):
        out_RD = torch.zeros(rows_RD.shape, dtype=torch.float32)
        for ids_R, weight_R in zip(expert_RK.T, weight_RK.T, strict=True):
            logical_R1 = self._logical_E[ids_R].float()[:, None]
            made_RD = rows_RD.float() * (logical_R1 + 1) / (layer + 1) + logical_R1
            out_RD += torch.where(ids_R[:, None] >= 0, weight_R[:, None] * made_RD, 0.0)
        return out_RD.to(rows_RD.dtype)


def echo(layer, rows_RD, expert_RK, weight_RK):
    """Experts that cost nothing, to measure what is left."""
    return rows_RD


class OrderedBackend:
    """NCCL's order of things on top of Gloo: a stand-in for the one part that needs GPUs.

    A batch starts when the one before it is over, and is over when its peers took all it sends.
    """

    def __init__(self, gloo: Any) -> None:
        self._gloo = gloo
        self._batch: list[tuple[bool, torch.Tensor, int]] = []
        self._stream = ThreadPoolExecutor(max_workers=1)

    def _start_coalescing(self) -> None:
        self._batch = []

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._batch.append((True, tensors[0], peer))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> None:
        self._batch.append((False, tensors[0], peer))

    def _end_coalescing(self) -> OrderedWork:
        return OrderedWork(self._stream.submit(self._run, self._batch))

    def close(self) -> Any:
        """The Gloo backend again, all batches over."""
        self._stream.shutdown(wait=True)
        return self._gloo

    def _run(self, batch: list[tuple[bool, torch.Tensor, int]]) -> None:
        deadline, taken = timedelta(seconds=20), torch.zeros(1, dtype=torch.uint8)
        sends = [self._gloo.send([tensor], peer, 0) for is_send, tensor, peer in batch if is_send]
        acks = [self._gloo.recv([taken.clone()], peer, 1) for is_send, _, peer in batch if is_send]
        for is_send, tensor, peer in batch:
            if not is_send:
                self._gloo.recv([tensor], peer, 0).wait(deadline)
                acks.append(self._gloo.send([taken], peer, 1))
        for work in sends + acks:
            work.wait(deadline)


class OrderedWork:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


class Cell:
    """This process's rank in a cell; `case` is the same on every rank."""

    def __init__(self, case: dict[str, Any], rank: int, epoch: int, store_port: int) -> None:
        self.case = case
        self.rank = rank
        self.epoch = epoch
        colocated = case["layout"] == "colocated"
        num_attention, num_expert = case["num_attention"], case["num_expert"]
        world_size = num_attention if colocated else num_attention + num_expert
        first_expert = 0 if colocated else num_attention
        expert_ranks = range(first_expert, first_expert + num_expert)
        self.placement = initial_placement(
            case["num_experts"], expert_ranks, case.get("num_redundant", 0)
        )
        self.layout = RowLayout(
            case["hidden_size"], case["num_experts_per_token"], DTYPES[case["dtype"]]
        )
        self.group: EpochGroup = join(
            Membership(
                epoch=epoch,
                rank=rank,
                world_size=world_size,
                store_host="127.0.0.1",
                store_port=store_port,
                timeout_s=20.0,
            ),
            "cpu",
            host="127.0.0.1",
        )
        wiring = Wiring(
            group=self.group,
            attention_ranks=range(num_attention),
            placement=self.placement,
            layout=self.layout,
            timeout_s=case.get("timeout_s", 20.0),
        )
        experts = echo if case.get("echo") else AffineExperts(self.placement, rank)
        if colocated:
            self.exchange = ColocatedExchange(wiring, experts)
        elif rank in expert_ranks:
            self.exchange = ExpertServer(wiring, experts)
        else:
            self.exchange = PairExchange(wiring)
        if case.get("ordered"):
            self._use_ordered_batches(store_port)
        alone = initial_placement(case["num_experts"], [0])
        self.reference = LocalExchange(AffineExperts(alone, 0), alone)

    def _use_ordered_batches(self, store_port: int) -> None:
        """Replace both lanes by backends of their own, as there are on CUDA."""
        second = join(
            Membership(
                epoch=10**6 + self.epoch,
                rank=self.rank,
                world_size=self.group.world_size,
                store_host="127.0.0.1",
                store_port=store_port,
                timeout_s=20.0,
            ),
            "cpu",
            host="127.0.0.1",
        )
        self.group._backends = [OrderedBackend(self.group.rows), OrderedBackend(second.replies)]
        self.exchange._links.batched = True
        self.exchange._links.finish = lambda moment: None

    def plan(self, step: int, tokens_AM: list[list[int]]) -> StepPlan:
        return StepPlan(self.epoch, step, self.case["sparse"], tokens_AM, 0)

    def run_step(self, plan: StepPlan) -> float:
        """One step; the largest difference from the reference over all of this rank's rows."""
        self.exchange.begin_step(plan)
        self.reference.begin_step(plan)
        num_layers = self.case["num_layers"]
        if self.rank >= len(plan.tokens_AM) or not any(plan.tokens_AM[self.rank]):
            self.exchange.serve_all(num_layers)
            return 0.0
        worst = 0.0
        tokens_M = plan.tokens_AM[self.rank]
        for layer in range(num_layers):  # micro-batches take turns, as in the decoder
            for micro_batch, num_tokens in enumerate(tokens_M):
                if layer:
                    worst = max(worst, self._difference(layer - 1, micro_batch))
                rows = self._rows(plan.step, layer, micro_batch, num_tokens)
                self.exchange.dispatch(layer, micro_batch, *rows)
                self.reference.dispatch(layer, micro_batch, *rows)
        for micro_batch in range(len(tokens_M)):
            worst = max(worst, self._difference(num_layers - 1, micro_batch))
        self.exchange.end_step()
        return worst

    def _rows(self, *place: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        *_, num_tokens = place
        seed = hash((self.rank, *place)) & 0x7FFFFFFF
        generator = torch.Generator().manual_seed(seed)
        layout = self.layout
        x_TD = torch.randn(num_tokens, layout.hidden_size, generator=generator).to(layout.dtype)
        chance_TE = torch.rand(num_tokens, self.case["num_experts"], generator=generator)
        weight_TK, expert_TK = chance_TE.topk(layout.num_experts_per_token, dim=1)
        return x_TD, expert_TK, weight_TK / weight_TK.sum(1, keepdim=True)

    def _difference(self, layer: int, micro_batch: int) -> float:
        got_TD = self.exchange.combine(layer, micro_batch)
        expected_TD = self.reference.combine(layer, micro_batch)
        assert got_TD.dtype == torch.float32
        assert got_TD.shape == expected_TD.shape
        return float((got_TD - expected_TD).abs().max()) if got_TD.numel() else 0.0


CELL: list[Cell] = []


def run_case(case, rank, epoch, store_port):
    """Form an epoch, run `case["steps"]`, leave; the largest difference and the rows carried."""
    cell = Cell(case, rank, epoch, store_port)
    worst = 0.0
    for step, tokens_AM in enumerate(case["steps"]):
        worst = max(worst, cell.run_step(cell.plan(step, tokens_AM)))
    num_rows = cell.exchange.counters.num_rows
    if case.get("ordered"):
        cell.group._backends = [backend.close() for backend in cell.group._backends]
    leave(cell.group)
    return worst, num_rows


def enter(case, rank, epoch, store_port):
    """Form an epoch and stay in it."""
    CELL[:] = [Cell(case, rank, epoch, store_port)]


def step(index, tokens_AM, claimed_epoch=None):
    """One step of the epoch entered; `claimed_epoch` makes this rank believe in another."""
    cell = CELL[0]
    plan = cell.plan(index, tokens_AM)
    if claimed_epoch is not None:
        cell.exchange._wiring.group.epoch = claimed_epoch
        plan = StepPlan(claimed_epoch, index, plan.sparse, tokens_AM, 0)
    return _step_or_leave(cell, plan)


def steps_until_error(tokens_AM):
    """Steps without end; a peer's failure ends them, and this rank leaves."""
    index = 0
    while True:
        _step_or_leave(CELL[0], CELL[0].plan(index, tokens_AM))
        index += 1


def refuse(plan_fields):
    """Begin a step whose plan is wrong in `plan_fields`."""
    fields = {"epoch": CELL[0].epoch, "step": 0, "sparse": False, "tokens_AM": [[1]]}
    plan = StepPlan(**{**fields, "placement_version": 0, **plan_fields})
    CELL[0].exchange.begin_step(plan)


def abort_from_a_thread(tokens_AM, after_s):
    """A step that another thread of this process aborts."""
    import threading

    timer = threading.Timer(after_s, CELL[0].group.abort)
    timer.start()
    began_s = time.monotonic()
    try:
        CELL[0].run_step(CELL[0].plan(0, tokens_AM))
    except TransportError as error:
        return error.message, time.monotonic() - began_s
    return "no error", 0.0


def leave_epoch():
    """Leave the epoch entered."""
    leave(CELL[0].group)
    CELL.clear()


def join_only(rank, world_size, epoch, store_port, timeout_s):
    """Form an epoch and leave it at once."""
    leave(
        join(
            Membership(
                epoch=epoch,
                rank=rank,
                world_size=world_size,
                store_host="127.0.0.1",
                store_port=store_port,
                timeout_s=timeout_s,
            ),
            "cpu",
            host="127.0.0.1",
        )
    )


def count_descriptors():
    """Open file descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def layer_seconds(num_steps, tokens_AM, num_layers):
    """Seconds per layer of steps that only exchange rows: the best step's and the median one's."""
    cell = CELL[0]
    taken = []
    rows = None
    for index in range(num_steps):
        plan = cell.plan(index, tokens_AM)
        began_s = time.perf_counter()
        cell.exchange.begin_step(plan)
        if cell.rank >= len(tokens_AM):
            cell.exchange.serve_all(num_layers)
        else:
            rows = rows or cell._rows(0, 0, 0, tokens_AM[cell.rank][0])
            for layer in range(num_layers):
                cell.exchange.dispatch(layer, 0, *rows)
                cell.exchange.combine(layer, 0)
            cell.exchange.end_step()
        taken.append((time.perf_counter() - began_s) / num_layers)
    return min(taken), sorted(taken)[len(taken) // 2]


def _step_or_leave(cell: Cell, plan: StepPlan) -> float:
    try:
        return cell.run_step(plan)
    except TransportError:
        leave(cell.group)
        raise


COMMANDS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        run_case,
        enter,
        step,
        steps_until_error,
        refuse,
        abort_from_a_thread,
        leave_epoch,
        join_only,
        count_descriptors,
        layer_seconds,
    )
}


def main() -> None:
    torch.set_num_threads(1)
    connection = Client(sys.argv[1], authkey=bytes.fromhex(sys.argv[2]))
    connection.send(int(sys.argv[3]))
    while True:
        try:
            name, keywords = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("result", COMMANDS[name](**keywords)))
        except TransportError as error:
            connection.send(("error", (error.message, error.peer)))


if __name__ == "__main__":
    main()
