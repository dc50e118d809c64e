"""Many copies of the server over Ray Serve: a door that reads requests, and replicas that answer them.

Ray's proxy hands a request to a door (door.py). The door names the beginnings of its prompt (names.py), and asks one of
the replicas (replica.py), each of which is the whole server without its socket. Which one, Ray asks router.py, which
knows from the replicas' reports what is in their caches (places.py). Starting, watching, scaling and streaming are
Ray's (deploy.py).
"""
