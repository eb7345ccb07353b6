"""The schedules, one file each: what it takes of the settings, its phases with their source, its registration."""
