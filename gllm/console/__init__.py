"""What the command lines of both shells share: parsing, what they say, and where their files go."""
