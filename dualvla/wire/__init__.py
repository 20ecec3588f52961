"""Codecs of the serving protocols. Knows numpy and msgpack only."""
