//! libFuzzer's program for `foreshore_fuzz::release`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foreshore_fuzz::release::run(bytes));
