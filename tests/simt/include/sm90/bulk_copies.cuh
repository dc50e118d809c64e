// The host versions of sm90/bulk_copies.cuh, mbarriers among them, are in device.cuh beside this folder.
#pragma once
#include "../device.cuh"
