"""What keeps a run going and its folder whole: the run lock, the status file, the check of the nodes. No torch at
import."""
