"""What a shard folder holds: checks (`lint`), example records (`preview`), counts (`stats`).

Each module named after a command of `emoverse` implements that command.
"""
