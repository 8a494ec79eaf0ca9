"""What a deployment is: layout, engine, serving, and the rest. Frozen, validated where made.

Plain data: no torch, no Ray. `configs.load` reads it from YAML; errors name the field's path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ostro.configs.bounds import at_least, positive
from ostro.configs.errors import ConfigError
from ostro.configs.image_fetch import ImageFetchConfig
from ostro.configs.observability import ObservabilityConfig
from ostro.configs.reasoning import ReasoningConfig
from ostro.configs.security import SecurityConfig
from ostro.configs.speculation import SpeculationConfig
from ostro.configs.tls import TlsConfig


class Layout(StrEnum):
    """Which ranks hold which role."""

    SINGLE = "single"
    COLOCATED = "colocated"
    SPLIT = "split"


class DispatchMode(StrEnum):
    """How rows travel: fixed shapes, exact counts, or chosen per step."""

    AUTO = "auto"
    DENSE = "dense"
    SPARSE = "sparse"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutConfig:
    """The ranks of one cell.

    Attributes:
        layout: `single` has one rank; `colocated` n ranks with both roles; `split` separates them.
        num_attention_shards: A. Ranks 0 .. A-1 hold attention, pages and the scheduler.
        num_expert_shards: E. Ranks A .. A+E-1 hold routed experts (ranks 0 .. A-1 if `colocated`).
        num_redundant_experts: Extra physical copies of experts, spread over all shards.
        dispatch: Dispatch mode; `auto` takes `dense` up to `dense_max_tokens` a micro-batch.
        dense_max_tokens: Largest micro-batch that `auto` sends densely.
        num_micro_batches: m; slices of a step that ping-pong between attention and experts.
        min_tokens_per_micro_batch: A step is not sliced below this size.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        shard_start_timeout_s: How long a shard may take to load its weights.
        join_timeout_s: How long the forming of a process group may take.
        step_timeout_s: How long a rank may stay silent within a step before the cell names it lost.
    """

    layout: Layout
    num_attention_shards: int
    num_expert_shards: int
    num_redundant_experts: int = 0
    dispatch: DispatchMode = DispatchMode.AUTO
    dense_max_tokens: int = 64
    num_micro_batches: int = 1
    min_tokens_per_micro_batch: int = 4
    device: str = "auto"
    shard_start_timeout_s: float = 600.0
    join_timeout_s: float = 60.0
    step_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        at_least(self, "num_attention_shards", 1)
        at_least(self, "num_expert_shards", 1)
        at_least(self, "num_redundant_experts", 0)
        at_least(self, "dense_max_tokens", 1)
        at_least(self, "min_tokens_per_micro_batch", 1)
        if self.num_micro_batches not in (1, 2):
            raise ConfigError(f"num_micro_batches={self.num_micro_batches}: must be 1 or 2")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device={self.device!r}: must be 'auto', 'cpu' or 'cuda'")
        if self.layout is Layout.SINGLE and self.world_size() != 1:
            raise ConfigError(
                "layout=single has one rank: set num_attention_shards and num_expert_shards to 1, "
                "or choose layout=split or layout=colocated"
            )
        if self.layout is Layout.SINGLE and self.num_micro_batches != 1:
            raise ConfigError("layout=single sends no rows: set num_micro_batches=1")
        if self.num_redundant_experts and self.num_expert_shards == 1:
            raise ConfigError(
                f"num_redundant_experts={self.num_redundant_experts}: copies of an expert go to "
                f"other shards, and there is one; set it to 0 or raise num_expert_shards"
            )
        if self.layout is Layout.COLOCATED and self.num_attention_shards != self.num_expert_shards:
            raise ConfigError(
                f"layout=colocated gives every rank both roles: num_attention_shards="
                f"{self.num_attention_shards} and num_expert_shards={self.num_expert_shards} "
                f"must be equal"
            )
        for name in ("shard_start_timeout_s", "join_timeout_s", "step_timeout_s"):
            positive(self, name)

    def world_size(self) -> int:
        """Ranks in the cell."""
        if self.layout is Layout.SPLIT:
            return self.num_attention_shards + self.num_expert_shards
        return max(self.num_attention_shards, self.num_expert_shards)

    def attention_ranks(self) -> range:
        """Ranks that hold the attention role."""
        return range(self.num_attention_shards)

    def expert_ranks(self) -> range:
        """Ranks that hold the expert role, in the order of physical experts."""
        if self.layout is Layout.SPLIT:
            return range(self.num_attention_shards, self.world_size())
        return range(self.num_expert_shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One attention shard's scheduler and cache.

    Attributes:
        page_size: Slots (tokens) per page.
        num_pages: Pages of the latent cache; None sizes it from `cache_memory_bytes`.
        cache_memory_bytes: Bytes for the latent cache of a shard if `num_pages` is None; None
            takes `gpu_memory_fraction` of what is free after the weights (CPU: 512 MiB).
        gpu_memory_fraction: Share of a GPU's memory that weights and cache may fill.
        max_tokens_per_step: Token budget of one step.
        inter_token_target_ms: What a step should take while requests decode: prompts of others are
            cut into chunks that leave so much between tokens; None computes them at full speed.
        max_running_requests: Requests that advance in one step, at most.
        max_waiting_requests: Requests that may wait at one shard; more are refused with 429.
        max_waiting_tokens: Prompt tokens that may wait at one shard, at most.
        max_live_image_bytes: Pixels of the requests that wait and run at one shard, at most; they
            are kept, as float16, as long as these live.
        max_context: Longest prompt plus output in tokens; None takes the checkpoint's.
        prefix_cache: Whether full pages are shared between requests.
        image_cache_bytes: Embeddings of images that a shard keeps for further requests, at most.
        dtype: "float32", "bfloat16" or "auto": bfloat16 on CUDA; on CPU where it is native and the
            model is large enough to gain from it.
        latent_cache_dtype: "auto" holds latents in the model's dtype; "fp8" in 0.6 of the bytes
            that bfloat16 takes, to three bits of mantissa: more requests or context, on CPU slower.
        num_threads: torch threads of a CPU rank; None gives `single` all cores, other layouts one.
        cuda_graphs: Whether decode steps of a rank alone on a GPU are captured when it starts.
        speculation: How tokens are drafted ahead and verified, several a step; None drafts none.
    """

    page_size: int = 16
    num_pages: int | None = None
    cache_memory_bytes: int | None = None
    gpu_memory_fraction: float = 0.9
    max_tokens_per_step: int = 2048
    inter_token_target_ms: float | None = None
    max_running_requests: int = 256
    max_waiting_requests: int = 1024
    max_waiting_tokens: int = 1_000_000
    max_live_image_bytes: int = 2 * 2**30
    max_context: int | None = None
    prefix_cache: bool = True
    image_cache_bytes: int = 256 * 2**20
    dtype: str = "auto"
    latent_cache_dtype: str = "auto"
    num_threads: int | None = None
    cuda_graphs: bool = True
    speculation: SpeculationConfig | None = None

    def __post_init__(self) -> None:
        for name in (
            "page_size",
            "max_tokens_per_step",
            "max_running_requests",
            "max_waiting_requests",
            "max_waiting_tokens",
            "max_live_image_bytes",
        ):
            at_least(self, name, 1)
        at_least(self, "image_cache_bytes", 0)
        for name in ("num_pages", "cache_memory_bytes", "max_context", "num_threads"):
            if getattr(self, name) is not None:
                at_least(self, name, 1)
        if self.max_running_requests > self.max_tokens_per_step:
            raise ConfigError(
                f"max_running_requests={self.max_running_requests} exceeds max_tokens_per_step="
                f"{self.max_tokens_per_step}: every running request needs one token a step"
            )
        if self.inter_token_target_ms is not None and not self.inter_token_target_ms > 0.0:
            raise ConfigError(
                f"inter_token_target_ms={self.inter_token_target_ms}: must be above 0"
            )
        if not 0.0 < self.gpu_memory_fraction <= 1.0:
            raise ConfigError(f"gpu_memory_fraction={self.gpu_memory_fraction}: must be in (0, 1]")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r}: must be 'auto', 'float32' or 'bfloat16'")
        if self.latent_cache_dtype not in ("auto", "fp8"):
            raise ConfigError(
                f"latent_cache_dtype={self.latent_cache_dtype!r}: must be 'auto' or 'fp8'"
            )

    def cached_in(self, dtype: str) -> str:
        """By name what latents are held in if the model is held in `dtype`: that, or "fp8"."""
        return dtype if self.latent_cache_dtype == "auto" else self.latent_cache_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """The faces.

    Attributes:
        host: Address that HTTP binds to.
        http_port: HTTP port.
        grpc_port: gRPC port.
        num_ingress_replicas: Ray Serve replicas of the ingress.
        max_ongoing_requests: Requests one ingress replica holds at a time.
        max_body_bytes: Largest request body; images fetched for a request, together, likewise.
        body_timeout_s: How long a request body may take to arrive.
        max_images: Images per request, at most; 0 takes none.
        max_image_bytes: Largest image file.
        max_image_pixels: Largest image, width times height; each one takes 15 bytes while it is
            made ready.
        image_fetch: Where images may be fetched from that requests name by https URL; None fetches
            nothing.
        max_stop_sequences: Stop strings per request, at most.
        max_choices: Answers per prompt (`n`), at most.
        max_prompts: Prompts per text completion, at most.
        submit_timeout_s: How long the router may take to accept a request.
        recovery_timeout_s: How long a request that lost its rank or the router waits for the cell
            to be mended, and then goes on; 0 fails it at once.
        request_timeout_s: How long one generation may take altogether.
        drain_timeout_s: How long running generations may finish after a stop was asked for.
        keep_alive_s: Pause after which an idle SSE stream gets a comment line.
        tls: Both faces speak TLS with it; None leaves them in clear text.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 9000
    num_ingress_replicas: int = 1
    max_ongoing_requests: int = 1024
    max_body_bytes: int = 32 * 2**20
    body_timeout_s: float = 120.0
    max_images: int = 8
    max_image_bytes: int = 10 * 2**20
    max_image_pixels: int = 25_000_000
    image_fetch: ImageFetchConfig | None = None
    max_stop_sequences: int = 16
    max_choices: int = 16
    max_prompts: int = 64
    submit_timeout_s: float = 10.0
    recovery_timeout_s: float = 120.0
    request_timeout_s: float = 3600.0
    drain_timeout_s: float = 20.0
    keep_alive_s: float = 15.0
    tls: TlsConfig | None = None

    def __post_init__(self) -> None:
        for name in (
            "num_ingress_replicas",
            "max_ongoing_requests",
            "max_body_bytes",
            "max_image_bytes",
            "max_image_pixels",
            "max_stop_sequences",
            "max_choices",
            "max_prompts",
        ):
            at_least(self, name, 1)
        at_least(self, "max_images", 0)
        for name in ("http_port", "grpc_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name}={getattr(self, name)}: must be in 1..65535")
        if self.http_port == self.grpc_port:
            raise ConfigError(
                f"http_port and grpc_port are both {self.http_port}: choose two ports"
            )
        for name in (
            "body_timeout_s",
            "submit_timeout_s",
            "request_timeout_s",
            "drain_timeout_s",
            "keep_alive_s",
        ):
            positive(self, name)
        if not self.recovery_timeout_s >= 0.0:
            raise ConfigError(f"recovery_timeout_s={self.recovery_timeout_s}: must be 0 or above")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentConfig:
    """One deployment: which model, on which ranks, behind which ports.

    Attributes:
        model: Directory of the checkpoint, or "embedded".
        served_name: Name clients use; None takes the checkpoint directory's name.
        aliases: Other names that clients may use for it; answers say `served_name`.
        notice: What users should know of the model, said in `/v1/models` and at the start.
        layout: The ranks.
        engine: Scheduler and cache of each attention shard.
        reasoning: The effort table.
        serving: The faces.
        security: Keys and the audit log.
        observability: Metrics and traces.
    """

    model: str
    layout: LayoutConfig
    served_name: str | None = None
    aliases: tuple[str, ...] = ()
    notice: str | None = None
    engine: EngineConfig = EngineConfig()
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)
    serving: ServingConfig = ServingConfig()
    security: SecurityConfig = field(default_factory=SecurityConfig)
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)

    def __post_init__(self) -> None:
        names = (self.served_name, *self.aliases)
        if "" in names or len(set(names)) != len(names):
            raise ConfigError(
                f"aliases={list(self.aliases)}: names must not be empty, nor stand twice, nor be "
                f"served_name={self.served_name!r}"
            )
