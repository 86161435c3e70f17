"""Layers: functions of arrays and their own settings; they know no mesh, no config file and no optimizer."""
