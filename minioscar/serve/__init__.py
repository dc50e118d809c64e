"""`minioscar serve`: many people's requests on one card, in the manner of OpenAI's API."""
