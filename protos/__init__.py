"""The gRPC API, compiled from the .proto files at install."""
