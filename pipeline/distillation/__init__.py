"""The paper: relation loss, taps, teacher, student. torch and transformers only."""
