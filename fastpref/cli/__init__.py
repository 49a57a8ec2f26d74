"""The command line: from arguments to an exit code.

Input: `sys.argv`. Output: a finished task, or one error message and a documented exit code.
Change here: how options are parsed and explained, the table of tasks.
"""
