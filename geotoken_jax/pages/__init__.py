"""HTML pages of reports, audits and scaling studies. A page opens from disk and loads nothing else."""
