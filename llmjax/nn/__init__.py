"""Layers: functions of arrays and their own settings, independent of mesh, config files and optimizer."""
