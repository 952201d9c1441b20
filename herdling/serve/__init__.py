"""The server: one engine behind the APIs that clients already speak (extra `serve`)."""
