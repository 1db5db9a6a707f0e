"""Files, here or in S3: whole or absent, found by one path; and the error that a user can act on."""
