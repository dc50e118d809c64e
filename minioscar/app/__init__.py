"""What a user talks to: the command line, chats, files of prompts. It uses the engine; nothing below knows it."""
