//! libFuzzer's program for `foreshore_fuzz::signature`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foreshore_fuzz::signature::run(bytes));
