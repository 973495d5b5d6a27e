"""Reads Math answers, LaTeX or plain, and compares them exactly; worker processes bound time and memory."""
