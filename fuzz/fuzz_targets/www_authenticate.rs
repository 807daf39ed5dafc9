//! libFuzzer's program for `foreshore_fuzz::www_authenticate`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foreshore_fuzz::www_authenticate::run(bytes));
