"""Jobs: files of prompts to folders of pictures, exactly once."""
