"""The router's connections to ingress replicas, by the replica's id."""

from __future__ import annotations

from ostro.actors.errors import OstroError
from ostro.actors.fabric.channel import AsyncConnection
from ostro.actors.fabric.messages import Message, Rejected


class IngressLinks:
    """Who is told what; what is meant for a replica that is gone is dropped."""

    def __init__(self) -> None:
        self._connections: dict[str, AsyncConnection] = {}

    def add(self, ingress_id: str, connection: AsyncConnection) -> None:
        """Take a replica's connection; one that it had before ends."""
        replaced = self._connections.get(ingress_id)
        if replaced is not None:
            replaced.close()
        self._connections[ingress_id] = connection

    def remove(self, ingress_id: str, connection: AsyncConnection) -> bool:
        """Drop a connection that ended; False if the replica has a newer one."""
        if self._connections.get(ingress_id) is not connection:
            return False
        del self._connections[ingress_id]
        return True

    def tell(self, ingress_id: str, message: Message) -> None:
        """Send to one replica."""
        connection = self._connections.get(ingress_id)
        if connection is not None:
            connection.send(message)

    def tell_all(self, message: Message) -> None:
        """Send to every replica."""
        for connection in self._connections.values():
            connection.send(message)

    def reject(self, ingress_id: str, request_id: str, error: OstroError) -> None:
        """Tell a replica that one of its requests was refused or has failed."""
        self.tell(
            ingress_id,
            Rejected(
                request_id=request_id,
                error=type(error).__name__,
                code=error.code,
                message=error.message,
                param=error.param,
                retry_after_s=error.retry_after_s,
            ),
        )
