//! libFuzzer's program for `foreshore_fuzz::compression`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foreshore_fuzz::compression::run(bytes));
