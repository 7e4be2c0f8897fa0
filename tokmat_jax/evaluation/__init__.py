"""The report card: does it beat ordinary decoding?"""
