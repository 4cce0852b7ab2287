"""What people look at: reports, comparisons, previews and model cards, made from files and from nothing else."""
