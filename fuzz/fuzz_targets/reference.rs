//! libFuzzer's program for `foreshore_fuzz::reference`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foreshore_fuzz::reference::run(bytes));
