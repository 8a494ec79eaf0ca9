"""A deployment that runs, as whoever launched it holds it."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from ostro.actors.fabric.messages import State
from ostro.configs.deployment import DeploymentConfig

if TYPE_CHECKING:
    from ostro.cluster.tls_certificate import FaceCertificate

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 30.0


@dataclass(slots=True)
class RunningCluster:
    """A cell that answers, and what must be ended with it.

    Attributes:
        ending: Ends all that the launch started, the last first.
        stage_seconds: How long each stage of the launch took.
        certificate: What the faces showed at the launch; None if they speak clear text.
    """

    deployment: DeploymentConfig
    router: Any
    secret: bytes
    ending: ExitStack
    stage_seconds: dict[str, float] = field(default_factory=dict)
    certificate: FaceCertificate | None = None
    ended: bool = False

    def state(self) -> State:
        """The cell at this moment."""
        state: State = ray.get(self.router.state.remote(), timeout=_CALL_TIMEOUT_S)
        return state

    def stop(self, drain_s: float | None = None) -> None:
        """End everything that was started, once running requests have had time to finish.

        Interrupted while it waits for them, it can be called again; later it ends the rest first.

        Args:
            drain_s: How long they may take; None is the deployment's `drain_timeout_s`.
        """
        if self.ended:
            return
        drain_s = self.deployment.serving.drain_timeout_s if drain_s is None else drain_s
        try:
            ray.get(self.router.drain.remote(drain_s), timeout=drain_s + _CALL_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("the router could not be drained: %s", type(error).__name__)
        self.ended = True
        self.ending.close()
