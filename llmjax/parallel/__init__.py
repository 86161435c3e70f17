"""Meshes, sharding rules, compilation and jobs of several processes."""
