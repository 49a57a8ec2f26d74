"""What a run goes on from, whether it may, and what tells it from another one."""
