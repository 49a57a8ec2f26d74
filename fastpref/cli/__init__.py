"""The command line: from arguments to an exit code.

Enters: `sys.argv`. Leaves: a finished task, or one error message and a documented exit code. To be
changed here: how options are parsed and explained, the table of tasks.
"""
