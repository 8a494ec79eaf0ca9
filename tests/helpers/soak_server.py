"""The server that a soak runs against: small limits, keys, two ingress replicas."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import httpx
from pictures import digit_picture
from process_census import Process, census
from prometheus_client.parser import text_string_to_metric_families
from served import Served

from ostro.cluster.key_file import make_key, write_keys
from ostro.configs.key_table import Key, KeyTable, Quota, Scope

# Little of everything, so that all of it runs full.
_SETTINGS = (
    "serving.num_ingress_replicas=2",
    "serving.max_body_bytes=1048576",
    "serving.body_timeout_s=6",  # enough for a body that comes on a busy machine
    "serving.keep_alive_s=1",
    "engine.num_pages=600",
    "engine.max_running_requests=16",
    "engine.max_waiting_requests=32",
    "engine.max_live_image_bytes=40000",  # of two pictures and a bit
)
_HELD = (
    "ostro_num_requests_running",
    "ostro_num_requests_waiting",
    "ostro_num_tokens_waiting",
    "ostro_kv_cache_usage_perc",
)
PICTURES = tuple(digit_picture(text) for text in ("56*78", "12*9", "4821"))
QUESTIONS = (
    "What is 847 * 26?",
    "What is 38 + 45 + 61?",
    "The ball is under cup 2. Swap cups 2 and 4. Swap cups 1 and 3. Where is the ball?",
)


class SoakServer(Served):
    """A server with keys.

    Attributes:
        keys: Of two tenants, and of an operator.
        poor_key: Of a tenant with a small quota.
    """

    def __init__(self, directory: Path) -> None:
        key_file, self.audit_file = directory / "keys.yaml", directory / "audit.jsonl"
        pairs = {tenant: make_key() for tenant in ("acme", "zeta", "ops", "poor")}
        scopes = (Scope.GENERATE, Scope.CONTROL, Scope.OBSERVE)
        keys = [
            Key(tenant=tenant, sha256=digest, scopes=(Scope.ADMIN,) if tenant == "ops" else scopes)
            for tenant, (_, digest) in pairs.items()
        ]
        quotas = {"poor": Quota(requests_per_minute=6)}
        write_keys(key_file, KeyTable(keys=tuple(keys), quotas=quotas))
        *rich, (self.poor_key, _) = pairs.values()
        self.keys = tuple(key for key, _ in rich)
        settings = (
            *_SETTINGS,
            f"security.key_file={key_file}",
            f"security.audit_file={self.audit_file}",
        )
        overrides = [part for setting in settings for part in ("--set", setting)]
        super().__init__(directory / "serve.log", "laptop", *overrides)

    def look(self) -> list[Process]:
        """Its processes at this moment."""
        return census(self.children())

    def pids(self, role: str) -> list[int]:
        """Its processes of one role."""
        return [process.pid for process in self.look() if process.role == role]

    def logs(self) -> list[Path]:
        """Ray's, ours, and the audit log."""
        (session,) = Path("/tmp/ray").glob(f"session_*_{self.process.pid}")
        of_ray = (path for path in (session / "logs").rglob("*") if path.is_file())
        return [self.log, self.audit_file, *of_ray]

    def held(self) -> dict[str, float]:
        """What requests hold at this moment, of all shards together."""
        headers = {"x-api-key": self.keys[0]}
        answer = httpx.get(f"{self.url}/metrics", headers=headers, timeout=60).raise_for_status()
        held = dict.fromkeys(_HELD, 0.0)
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                if sample.name in held:
                    held[sample.name] += sample.value
        return held

    def is_ready(self) -> bool:
        """Whether requests are taken; once in a while by each of the replicas."""
        return all(httpx.get(f"{self.url}/ready", timeout=10).status_code == 200 for _ in range(4))

    def answer(self, question: str) -> list[int]:
        """The tokens of a greedy answer."""
        answer = self._ask(question, temperature=0, return_token_ids=True).raise_for_status()
        token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return token_ids

    def look_at(self, picture: bytes) -> int:
        """The status of a request with a picture."""
        uri = f"data:image/png;base64,{b64encode(picture).decode()}"
        return self._ask([{"type": "image_url", "image_url": uri}], max_tokens=4).status_code

    def _ask(self, content: object, **fields: object) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, "reasoning_effort": "high", **fields}
        url, headers = f"{self.url}/v1/chat/completions", {"x-api-key": self.keys[0]}
        return httpx.post(url, json=body, headers=headers, timeout=240)
