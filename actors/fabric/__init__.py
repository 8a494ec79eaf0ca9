"""How ranks of a cell reach each other: messages, sockets, transports, placement."""
