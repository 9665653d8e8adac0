"""The gRPC services. Only they and the replication transport use protobuf."""
