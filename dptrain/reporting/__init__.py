"""What ``dptrain report`` writes of a run directory: a statement as data, as Markdown, and as one page that works offline."""
