"""The update rules, one file each: the settings it follows, its formula with the source, its registration."""
