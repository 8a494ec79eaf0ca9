"""The actors of a cell: router, attention shards and expert shards, and what they are made of."""
