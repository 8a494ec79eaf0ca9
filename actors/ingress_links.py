"""The router's connections to ingress replicas, by the replica's id."""

from __future__ import annotations

from ostro.actors.engine.quotas import TenantQuotas
from ostro.actors.errors import OstroError, QuotaError
from ostro.actors.fabric.channel import AsyncConnection
from ostro.actors.fabric.messages import CountRequest, Message, Rejected, RequestCounted


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
        self.tell(ingress_id, Rejected.by(request_id, error))


def counted(asked: CountRequest, quotas: TenantQuotas) -> RequestCounted:
    """Count a request that generates nothing; the answer says why not, where it is too much."""
    try:
        quotas.count_request(asked.tenant)
    except QuotaError as error:
        return RequestCounted(asked.tag, Rejected.by("", error))
    return RequestCounted(asked.tag, None)
