"""Load tests: loops, arrivals, prompts, turns between servers, options and exit codes."""

import asyncio
import json
import statistics
import threading
import time
from itertools import pairwise

import pytest
from aiohttp import web
from typer.testing import CliRunner

from ostro.cluster.bench import app
from ostro.cluster.bench_load import (
    ClosedLoop,
    OpenLoop,
    PromptShape,
    poisson_arrivals,
    run_load,
)
from ostro.cluster.bench_statistics import Outcome

SHAPE = PromptShape(num_tokens=5, as_text=False, first_token_id=10, end_token_id=1000)


class Meter:
    """Answers after a few turns of the loop and knows how many requests were under way."""

    def __init__(self, turns=3):
        self.turns, self.running, self.most, self.prompts = turns, 0, 0, []

    async def send(self, prompt, due_s):
        self.prompts.append(prompt)
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(self.turns):
            await asyncio.sleep(0)
        self.running -= 1
        now_s = time.perf_counter()
        return Outcome(due_s=due_s, ended_s=now_s, arrivals_s=(now_s,), num_output_tokens=1)


def run(load, num_requests, meter):
    ended = []
    result = asyncio.run(
        run_load(load, meter.send, range(num_requests), "seed", lambda: ended.append(1))
    )
    assert len(ended) == num_requests
    return result


# ---- loops


def test_closed_loop_keeps_so_many_requests_running():
    meter = Meter()
    outcome = run(ClosedLoop(3), 10, meter)
    assert meter.most == 3
    assert sorted(meter.prompts) == list(range(10))
    assert len(outcome.outcomes) == 10
    assert outcome.num_held == 0


def test_open_loop_sends_in_order_and_counts_latency_from_when_a_request_was_due():
    meter = Meter()
    outcome = run(OpenLoop(2000.0, 64), 20, meter)
    assert meter.prompts == list(range(20))
    due_s = [done.due_s for done in outcome.outcomes]
    offsets_s = poisson_arrivals(2000.0, 20, "seed")
    assert [due - due_s[0] for due in due_s] == pytest.approx(
        [offset - offsets_s[0] for offset in offsets_s]
    )


def test_open_loop_is_bounded_and_tells_how_many_it_held():
    meter = Meter(turns=2000)
    outcome = run(OpenLoop(1e9, 2), 8, meter)
    assert meter.most == 2
    assert outcome.num_held == 6


def test_poisson_arrivals_have_exponential_gaps_of_the_rate():
    arrivals_s = poisson_arrivals(4.0, 20_000, "a")
    gaps_s = [later - earlier for earlier, later in pairwise(arrivals_s)]
    assert statistics.mean(gaps_s) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps_s) == pytest.approx(0.25, rel=0.05)
    assert min(gaps_s) >= 0


def test_poisson_arrivals_repeat_for_a_seed():
    assert poisson_arrivals(4.0, 9, "a") == poisson_arrivals(4.0, 9, "a")
    assert poisson_arrivals(4.0, 9, "a") != poisson_arrivals(4.0, 9, "b")


def test_prompts_differ_between_requests_and_names_and_repeat_for_both():
    first = SHAPE.prompts(20, "0/c=1")
    assert first == SHAPE.prompts(20, "0/c=1")
    others = SHAPE.prompts(20, "1/c=1")
    assert len({tuple(prompt) for prompt in (*first, *others)}) == 40
    assert all(10 <= token < 1000 and len(prompt) == 5 for prompt in first for token in prompt)


def test_text_prompts_are_words():
    shape = PromptShape(num_tokens=7, as_text=True, first_token_id=0, end_token_id=1)
    assert [len(prompt.split()) for prompt in shape.prompts(2, "n")] == [7, 7]


# ---- the command


class FakeServer:
    """An OpenAI-compatible server in a thread; every request is noted, some fail."""

    def __init__(self, log, name, *, status=200, fail_after=None):
        self.log, self.name, self.status, self.fail_after = log, name, status, fail_after
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self):
        asyncio.set_event_loop(self._loop)
        web_app = web.Application()
        web_app.router.add_post("/v1/completions", self._answer)
        runner = web.AppRunner(web_app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = site._server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    async def _answer(self, request):
        body = await request.json()
        self.log.append((self.name, tuple(body["prompt"]), body))
        mine = sum(name == self.name for name, *_ in self.log)
        failing = self.fail_after is not None and mine > self.fail_after
        if self.status != 200 or failing:
            return web.json_response({"error": {"message": "no room"}}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for text, reason in (("a", None), ("b", None), ("", "length")):
            chunk = {"choices": [{"text": text, "finish_reason": reason}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            await asyncio.sleep(0.002)
        usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
        await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        return response


def bench(*arguments):
    return CliRunner().invoke(app, ["serve", *arguments])


SMALL = "--model m --concurrency 2 --requests 4 --rounds 2 --prompt-tokens 3 --new-tokens 2".split()


def test_two_servers_take_turns_with_the_same_prompts(tmp_path):
    log = []
    with FakeServer(log, "a") as a, FakeServer(log, "b") as b:
        told = tmp_path / "told.json"
        result = bench(
            a, "--beside", b, "--name", "A", "--beside-name", "B", *SMALL, "--json", str(told)
        )
    assert result.exit_code == 0, result.output
    names = "".join(name for name, *_ in log)
    assert names == "aabb" + ("aaaa" + "bbbb") * 2  # the warm-up first
    by_server = {
        name: sorted(prompt for other, prompt, _ in log if other == name) for name in ("a", "b")
    }
    assert by_server["a"] == by_server["b"]
    assert len(set(by_server["a"])) == 10
    assert log[0][2]["ignore_eos"] is True
    body = json.loads(told.read_text())
    figures = {(row["subject"], row["quantity"]): row for row in body["figures"]}
    assert len(figures["A", "TTFT p50 c=2"]["samples"]) == 2
    assert figures["B", "errors c=2"]["samples"] == [0.0, 0.0]
    assert "ratio to B" in result.output


def test_open_loop_and_slo_give_goodput(tmp_path):
    told = tmp_path / "told.json"
    with FakeServer([], "a") as a:
        result = bench(
            a,
            *"--model m --request-rate 200 --requests 5 --rounds 1 --new-tokens 2".split(),
            *"--prompt-tokens 3 --slo-ttft-ms 60000".split(),
            *("--json", str(told)),
        )
    assert result.exit_code == 0, result.output
    figures = {row["quantity"]: row for row in json.loads(told.read_text())["figures"]}
    assert figures["goodput share r=200/s"]["samples"] == [100.0]
    assert not [name for name in figures if "c=" in name]


def test_a_server_that_refuses_everything_is_named_with_the_reason():
    with FakeServer([], "a", status=503) as a:
        result = bench(a, *SMALL)
    assert result.exit_code == 1
    assert "HTTP 503" in result.output
    assert "no room" in result.output


def test_a_server_that_fails_after_the_warm_up_ends_in_a_table_of_failures():
    with FakeServer([], "a", fail_after=2) as a:
        result = bench(a, *SMALL)
    assert result.exit_code == 1
    assert "HTTP 503" in result.output
    assert "answered no request" in result.output


def test_some_failures_are_shown_and_are_no_end():
    with FakeServer([], "a", fail_after=6) as a:
        result = bench(a, *SMALL)
    assert result.exit_code == 0
    assert "Failed requests" in result.output


def test_answers_shorter_than_asked_are_remarked():
    with FakeServer([], "a") as a:
        result = bench(a, *SMALL, "--new-tokens", "9")
    assert "shorter than 9 tokens" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://h", "--concurrency", "0"], "at least 1"),
        (["http://h", "--concurrency", "x"], "separated by commas"),
        (["http://h", "--request-rate", "-1"], "greater than 0"),
        (["http://h", "--request-rate", "nan"], "greater than 0"),
        (["http://h", "--concurrency", ""], "neither"),
        (["http://h", "--token-ids", "9:3"], "FIRST:END"),
        (["http://h", "--api", "chat", "--prompt-kind", "tokens"], "text only"),
        (["http://h", "--extra", "[1]"], "JSON object"),
        (["http://h", "--json", "/no/such/figures.json"], "no such folder"),
        (["http://h", "--json", "/"], "is a directory"),
        (["ftp://h"], "must be the URL of an HTTP face"),
        (["http://h", "--beside", "http://h/v1/"], "one name"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_sent(arguments, said):
    result = bench(*arguments, "--model", "m")
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())
