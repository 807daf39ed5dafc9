//! libFuzzer's program for `foreshore_fuzz::oci_config`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| foreshore_fuzz::oci_config::run(bytes));
