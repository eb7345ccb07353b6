"""Starting ranks: by itself on one machine, or joining those that torchrun or srun started."""
