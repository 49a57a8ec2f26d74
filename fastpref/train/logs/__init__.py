"""What a run says: its numbers, to files, trackers and people; its advice; its closing table."""
