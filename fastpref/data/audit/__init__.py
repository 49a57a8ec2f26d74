"""What a user sees of the data before training: its account, its lengths, its rows token by token.

Above all else of the room, which never asks for it.
"""
